"""Measure chapter 4 over a base model of Llama-2-7B's shape: time, memory, and share of the matrix rate.

    python benchmarks/large.py --base-model FOLDER --make 7B --tokenizer FOLDER    # random weights, once
    python benchmarks/large.py --base-model FOLDER --data-dir FOLDER --card "80 GB"
    python benchmarks/large.py --base-model FOLDER --data-dir FOLDER --card "24 GB" --steps 50

Papermill runs notebooks/04_ilora.ipynb with the paper's rank, dropout and batch on MovieLens: training of iLoRA and
LoRA, validation and test. On a larger card, torch may take no more memory than CARDS says.

A step is the median of the second half of the steps, so that compilation does not count. Its operations are 4 for each
token and weight of the layers: 2 forward and 2 backward, because base weights have no gradients. Recomputation and the
attention's products do not count. Tokens are those of prompts and answers, without padding. Memory of the process is
what the device has in use beyond the time before the notebook, and includes CUDA's own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import psutil
import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ilora import data, devices
from ilora.language import Prompts

ROOT = Path(__file__).resolve().parents[1]
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings",
)  # fmt: skip
SHAPES = {
    "tiny": (64, 128, 2, 4, 4, False),
    "SmolLM2": (576, 1536, 30, 9, 3, True),
    "7B": (4096, 11008, 32, 32, 32, False),
}
SAVING = {"quantize": "4bit", "gradient_checkpointing": True}
CARDS = {"80 GB": (78.0, {}), "24 GB": (21.0, SAVING)}  # GiB that torch may take, and parameters of the notebook
PAPER = {"experts": 4, "rank": 8, "dropout": 0.1, "learning_rate": 1e-4, "epochs": 1, "encoder_epochs": 2}
EPOCHS = 5  # of LLaRA's scripts


def make(shape: str, folder: Path, tokenizer: str, device: torch.device) -> None:
    """Write a Llama with random weights in bfloat16, and the tokenizer."""
    config = LlamaConfig(**dict(zip(SIZES, SHAPES[shape], strict=True)), max_position_embeddings=4096)
    config.vocab_size = len(AutoTokenizer.from_pretrained(tokenizer))
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, folder)


def layer_weights(folder: str) -> int:
    """Number of weights in the layers: neither embeddings nor output layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    return sum(value.numel() for value in model.model.layers.parameters())


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large square matrix product in bfloat16."""
    side = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = [measure.timed(lambda: torch.mm(a, b), device)[0] for _ in range(20)]
    return 2 * side**3 / float(np.median(seconds[5:]))


def used_gib(device: torch.device) -> float:
    """Memory of the device that all processes use."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def run_notebook(home: Path, parameters: dict, options: Namespace, device: torch.device) -> dict:
    """Run chapter 4 in its own processes; returns its seconds, and the most memory that it used or an error."""
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    if device.type == "cuda":
        share = min(CARDS[options.card][0] * 2**30 / torch.cuda.mem_get_info(device)[1], 1.0)
        text = f"__import__('torch').cuda.set_per_process_memory_fraction({share})\n"
        (startup / "memory.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "04_ilora.ipynb", home / "out.ipynb"]
    command += [text for name, value in parameters.items() for text in ("-p", name, str(value))]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"ILORA_HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": paths}
    started, before, most = time.monotonic(), used_gib(device), 0.0
    with open(home / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen([*map(str, command)], env=variables, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and time.monotonic() - started < 60 * options.minutes:
            most = max(most, used_gib(device) - before)
            time.sleep(0.1)
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)  # papermill ends its kernel
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            for child in children:
                if child.is_running():
                    child.kill()
            process.wait()
    result = {"seconds": time.monotonic() - started, "gib_of_the_process": most}
    if process.returncode:
        lines = (home / "log").read_text(encoding="utf-8").strip().splitlines()
        result["error"] = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
    return result


def tokens_per_step(options: Namespace) -> tuple[float, int]:
    """Mean number of tokens of a step's prompts and answers, and the number of all training sequences."""
    source = data.load(options.dataset, options.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    prompts = Prompts(tokenizer, list(source.items["title"]), source.noun, source.verb)
    rows = data.questions(source, "train", limit=options.steps * options.batch_size)
    some = (rows[i] for i in range(0, len(rows), max(1, len(rows) // 2000)))
    lengths = [len(prompts.write(*row[:2], hybrid=True)) + len(prompts.answers[row[2]]) for row in some]
    return float(np.mean(lengths)) * options.batch_size, len(data.questions(source, "train"))


def adapter_report(folder: Path, tokens: float, rows: int, operations: float, rate: float, batch_size: int) -> dict:
    """What a trained adapter's folder says about its training."""
    history = pd.read_csv(folder / "history.csv")
    elapsed, about = history["seconds"].to_numpy(), json.loads((folder / "recommender/recommender.json").read_bytes())
    steps = np.diff(elapsed)[len(elapsed) // 2 :]
    step = float(np.median(steps))
    earlier, last = sorted((folder / "snapshots").iterdir())[-2:]  # before the validation, and after it
    between = last.stat().st_mtime - earlier.stat().st_mtime
    between -= elapsed[-1] - elapsed[int(earlier.stem.removeprefix("step-")) - 1]
    return {
        "steps": len(history), "rows": about["batch_size"], "seconds": measure.spread(steps),
        "first_step_seconds": round(elapsed[0], 1), "training_seconds": round(elapsed[-1], 1),
        "validation_seconds": round(between, 1), "tokens_per_step": round(tokens),
        "tokens_per_second": round(tokens / step, 1),
        "share_of_matrix_rate": round(operations * tokens / step / rate, 4),
        "hours": round(EPOCHS * rows / batch_size * step / 3600, 3),
        "first_loss": history["loss"].iloc[0], "last_loss": history["loss"].iloc[-1],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, batch_size=128)
    parser.add_argument("--base-model", required=True, help="the folder of the base model")
    parser.add_argument("--make", choices=SHAPES, help="write a base model of this shape there, and stop")
    parser.add_argument("--tokenizer", help="the folder with the tokenizer of the model that is made")
    parser.add_argument("--card", choices=CARDS, default="80 GB", help="the card and its settings (80 GB)")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help="compile layers (auto)")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each adapter (100)")
    parser.add_argument("--questions", type=int, default=1000, help="test questions (1000)")
    parser.add_argument("--dataset", default="movielens", help="the data set (movielens)")
    parser.add_argument("--data-dir", default="", help="the folder with its files (download)")
    parser.add_argument("--minutes", type=float, default=60, help="the notebook is stopped after this time (60)")
    options = parser.parse_args(arguments)
    if options.make:
        make(options.make, Path(options.base_model), options.tokenizer, devices.pick_device(options.device))
        return
    name = f"large_{options.card.replace(' ', '').lower()}"
    run, out = measure.start(name, options, "base_model", "data_dir", "make", "tokenizer", "minutes")
    device, settings = run.device, CARDS[options.card][1]
    rate, operations = matrix_rate(device), 4 * layer_weights(options.base_model)
    metrics = {"matmul": {"tera_per_second": rate / 1e12, "goal": 0.5}}
    torch.cuda.empty_cache()
    if device.type == "cpu":  # bitsandbytes is for GPUs
        settings = {name: value for name, value in settings.items() if name != "quantize"}
    places = {"base_model": options.base_model, "dataset": options.dataset, "data_dir": options.data_dir}
    sizes = {"batch_size": options.batch_size, "micro_batch_size": 0, "device": options.device}
    sizes |= {"compile": options.compile}
    sizes |= {"train_limit": options.steps * options.batch_size, "test_limit": options.questions}
    parameters = {name: value for name, value in (places | sizes | PAPER | settings).items() if value != ""}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        metrics["notebook"] = run_notebook(home, parameters, options, device)
        tokens, rows = tokens_per_step(options)
        for folder in sorted((home / "adapters").glob("[!.]*")):
            experts = json.loads((folder / "parameters.json").read_bytes())["settings"]["experts"]
            report = adapter_report(folder, tokens, rows, operations, rate, options.batch_size)
            metrics["LoRA" if experts == 1 else "iLoRA"] = report
        for file in (home / "results").glob("04_ilora-*.json"):
            result = json.loads(file.read_bytes())
            metrics["notebook"] |= {"gib_of_torch": result["peak_memory_mib"] / 2**10}
            cells = json.loads((home / "out.ipynb").read_bytes())["cells"]
            (test,) = (cell for cell in cells if "evaluate(model, questions)" in "".join(cell["source"]))
            metrics["notebook"]["test_seconds"] = test["metadata"]["papermill"]["duration"]
            metrics["notebook"]["valid_ratio"] = result["metrics"]["iLoRA"]["valid_ratio"]
        if "error" in metrics["notebook"]:
            print((home / "log").read_text(encoding="utf-8")[-5000:])
    for part, content in metrics.items():
        print(part, content, flush=True)
    run.save(metrics, path=out)
    print(out)


if __name__ == "__main__":
    main()
