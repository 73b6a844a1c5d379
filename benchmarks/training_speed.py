"""Measure training examples and ranked questions per second, for LoRA and iLoRA, with and without compiled layers.

    python benchmarks/training_speed.py --base-model smollm2 --dataset movielens --data-dir DIR

This is for a GPU. Training and ranking run twice, and only the second run counts, without the time to compile.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measure

from ilora import data, devices, evaluation, language
from ilora.data import Questions
from ilora.language import LanguageRecommender, adapter_config
from ilora.recommenders import SASRec
from ilora.training import TrainingArguments, fit


def train(model: LanguageRecommender, rows: Questions, options: argparse.Namespace, compiled: str) -> None:
    precision = "bf16" if model.device.type == "cuda" else "no"
    arguments = TrainingArguments(
        1, options.batch_size, 1e-3, precision=precision, micro_batch_size=options.micro_batch_size,
        device=model.device.type, compile=compiled,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fit(model, rows, arguments, Path(folder))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    texts = {
        "base-model": ("smollm2", "name or folder of the base model"),
        "dataset": ("movielens", "the data set"),
        "data-dir": ("", "the folder with its files"),
        "device": ("auto", "auto, cpu or cuda"),
    }
    for name, (default, meaning) in texts.items():
        parser.add_argument(f"--{name}", default=default, help=f"{meaning} ({default or 'download'})")
    numbers = {
        "steps": (20, "optimiser steps of a training"),
        "batch-size": (128, "sequences per optimiser step"),
        "micro-batch-size": (128, "sequences per forward pass"),
        "questions": (512, "questions that are ranked"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    options = parser.parse_args(arguments)
    device, source = devices.pick_device(options.device), data.load(options.dataset, options.data_dir)
    rows = data.questions(source, "train", limit=options.steps * options.batch_size)
    questions = data.questions(source, "test", limit=options.questions)
    for name, experts in (("LoRA", 1), ("iLoRA", 4)):
        for compiled in ("yes", "no"):
            plain = language.untuned(source, options.base_model, device=options.device)
            config = adapter_config(experts=experts, dropout=0.0)
            model = LanguageRecommender(plain.language_model, plain.prompts, SASRec(len(source.items)), config)
            training = partial(train, model, rows, options, compiled)
            ranking = partial(evaluation.evaluate, model, questions, generate=False)
            first, seconds = (measure.timed(training, device)[0] for _ in range(2))
            ranked = [measure.timed(ranking, device)[0] for _ in range(2)][1]
            print(f"{name}, compile {compiled}: {len(rows) / seconds:.0f} examples/s, {len(questions) / ranked:.0f} "
                  f"questions/s; {first - seconds:.0f} s longer in the first run", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
