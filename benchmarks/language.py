"""Compare the language recommender with the usual ways to do the same work: same model, data and results.

    python benchmarks/language.py                # on the GPU if torch sees one, else on the CPU
    python benchmarks/language.py --base-model smollm2 --dataset movielens --parts training \\
        --batch-size 128 --examples 2560

The model is the embedded one, or --base-model, with iLoRA of 4 experts; "training" has LoRA, too. Its B is close to
zero but not zero, so that the adapter does all its work and predictions stay close to those of the base model.

    training     `fit`, or transformers' Trainer with a collator that tokenises text and a loss over all logits;
                 compilation is in the first training of each, which is not measured
    prompts      prompts from pieces that were tokenised once, or from text in batches or one by one
    ranking      20 candidates after one prompt, or 20 forward passes
    answers      greedy predictions in batches of similar length, one prompt at a time, or in unsorted batches
    evaluation   predictions and ranks in one pass, or separately and in unsorted batches
    serving      all users in one forward pass, or each user's LoRA merged into the weights and removed again
    next token   the same for one more token per user, with the prompts in the cache
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate.utils import set_seed
from large import matrix_rate
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ilora import data, evaluation, language
from ilora.data import Questions
from ilora.evaluation.outcomes import batches_by_length
from ilora.language import ITEM_TOKEN, NO_LABEL, PROMPT, LanguageRecommender, adapter_config, ranking, wording
from ilora.recommenders import SASRec
from ilora.training import TrainingArguments, fit
from ilora.training.loop import combined_seed

Row = tuple[np.ndarray, np.ndarray, int]
Ways = dict[str, Callable]
TOGETHER = 16  # rows per batch in the usual evaluation
GOALS = {  # part -> way -> goal for the ratio of its time to that of the first way
    "training": {"Trainer": {"at_least": 2}},
    "prompts": {"text": {"at_least": 10}},
    "ranking": {"20 passes": {"at_least": 8}},
    "answers": {"one at a time": {"at_least": 5}, "as they come": {"at_least": 1.5}},
    "serving": {"merged": {"at_least": 10}},
    "next token": {"merged": {"at_least": 10}},
}


class Bench:
    """A model, training and test questions, and for each part its ways and a function that compares their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        set_seed(0)
        source = data.load(options.dataset, options.data_dir, users=options.users)
        self.make = partial(make_model, source, options)
        self.model = self.make()
        self.batch_size, self.micro_batch_size = options.batch_size, options.micro_batch_size
        self.train = data.questions(source, "train", limit=options.examples)
        self.questions = data.questions(source, "test", limit=options.questions)
        self.rows = [self.questions[row] for row in range(len(self.questions))]
        self.clients = self.rows[: options.clients]
        self.together = 64 if self.model.device.type == "cuda" else 32  # as `evaluate` has it

    def training(self) -> tuple[Ways, Callable]:
        trained, at_once = (self.train, self.batch_size), {"micro_batch_size": self.micro_batch_size}
        ways = {
            "fit": partial(train_by_fit, self.make(), *trained, **at_once),
            "Trainer": partial(train_by_trainer, self.make(), *trained),
            "fit, LoRA": partial(train_by_fit, self.make(experts=1), *trained, **at_once),
            "Trainer, LoRA": partial(train_by_trainer, self.make(experts=1), *trained),
        }
        return ways, lambda results: {}  # each trains its model further

    def rates(self, measured: dict, steps: dict[str, np.ndarray], matrix_rate: float) -> None:
        """Add the time of a step, whose ratio leaves out what happens once per training, and rates as in large.py."""
        rows = [self.train[row] for row in range(len(self.train))]
        tokens = np.mean([self.model.length(row) + len(self.model.prompts.answers[row[2]]) for row in rows])
        layers = self.model.language_model.get_base_model().get_decoder().layers
        weights = sum(p.numel() for p in layers.parameters() if not p.requires_grad)
        for name, seconds in steps.items():
            way, later = measured[name], seconds[len(seconds) // 2 :]
            way["step_seconds"] = measure.spread(later)
            way["step_ratio"] = round(float(np.median(later) / np.median(steps["fit"][len(seconds) // 2 :])), 4)
            examples = self.batch_size / float(np.median(later))
            way["examples_per_second"] = round(examples, 1)
            way["tokens_per_second"] = round(examples * tokens, 1)
            way["share_of_matrix_rate"] = round(4 * weights * examples * tokens / matrix_rate, 4)

    def prompts(self) -> tuple[Ways, Callable]:
        model, batches = self.model, cut(self.rows, self.batch_size)
        ways = {
            "pieces": lambda: [
                model.prompts.batch(*list(zip(*rows, strict=True))[:2])["input_ids"] for rows in batches
            ],
            "text": lambda: [tokenised(model, texts(model, rows))["input_ids"] for rows in batches],
            "text, one by one": lambda: [tokenised(model, texts(model, [row])) for row in self.rows],
        }
        return ways, lambda results: {"equal ids": all(map(torch.equal, results["pieces"], results["text"]))}

    def ranking(self) -> tuple[Ways, Callable]:
        batches = cut(self.rows, self.together)
        ways = {
            "one pass": lambda: torch.cat([self.model.score(rows) for rows in batches]),
            "20 passes": lambda: torch.cat([ranking.scores(self.model, rows, one_pass=False)[0] for rows in batches]),
        }
        return ways, largest_difference

    def answers(self) -> tuple[Ways, Callable]:
        ways = {
            "like length": lambda: answer_by_length(self.model, self.questions, self.together),
            "one at a time": lambda: [self.model.generate([row])[0] for row in self.rows],
            "as they come": lambda: [c for part in cut(self.rows, TOGETHER) for c in self.model.generate(part)],
        }

        def agreement(results: dict[str, list]) -> dict[str, float]:
            first, *others = (np.array([-1 if c is None else c for c in columns]) for columns in results.values())
            return {
                "equal answers": np.mean([first == other for other in others]),
                "valid answers": (first >= 0).mean(),
            }

        return ways, agreement

    def evaluation(self) -> tuple[Ways, Callable]:
        ways = {
            "one pass": lambda: evaluation.evaluate(self.model, self.questions, self.together),
            "rank, then generate": lambda: evaluation.evaluate(Apart(self.model), self.questions, TOGETHER),
        }

        def agreement(results: dict[str, pd.DataFrame]) -> dict[str, float]:
            first, second = results.values()
            equal = {column: (first[column] == second[column]).mean() for column in ("answer", "rank")}
            return {f"equal {column}s": float(share) for column, share in equal.items()}

        return ways, agreement

    def serving(self) -> tuple[Ways, Callable]:
        together, z = prompts_of(self.model, self.clients)
        single = [prompts_of(self.model, [row])[0] for row in self.clients]
        return self._served(together, single, z)

    def next_token(self) -> tuple[Ways, Callable]:
        together, z = prompts_of(self.model, self.clients)
        single = [prompts_of(self.model, [row])[0] for row in self.clients]
        single = [after_prompts(self.model, inputs, z[[row]]) for row, inputs in enumerate(single)]
        return self._served(after_prompts(self.model, together, z), single, z)

    def _served(self, together: dict, single: list[dict], z: Tensor) -> tuple[Ways, Callable]:
        ways = {
            "one pass": lambda: serve_together(self.model, together, z),
            "merged": lambda: serve_merged(self.model, single, z),
        }
        return ways, largest_difference


def make_model(source: data.Dataset, options: argparse.Namespace, experts: int = 4) -> LanguageRecommender:
    """iLoRA, or LoRA, over the base, with a small random B."""
    plain = language.untuned(source, options.base_model, device=options.device)
    config = adapter_config(experts=experts, dropout=0.0)
    model = LanguageRecommender(plain.language_model, plain.prompts, SASRec(len(source.items)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 1e-3 * torch.randn_like(parameter)
    return model


PARTS = {
    "training": Bench.training, "prompts": Bench.prompts, "ranking": Bench.ranking, "answers": Bench.answers,
    "evaluation": Bench.evaluation, "serving": Bench.serving, "next token": Bench.next_token,
}  # fmt: skip


def cut(rows: Sequence, size: int) -> list[Sequence]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def largest_difference(results: dict[str, Tensor]) -> dict[str, float]:
    """Between the results of two ways, relative to their standard deviation."""
    first, second = results.values()
    return {"largest difference": float((first - second).abs().max() / first.std())}


# ---------------------------------------------------------------- the usual ways


def texts(model: LanguageRecommender, rows: Sequence[Row], answers: bool = False) -> list[str]:
    """The prompt of each row as text; with `answers` it ends in the target."""
    prompts, mark = model.prompts, ITEM_TOKEN if model.encoder is not None else ""
    opening, offer, question = wording(*prompts.words)
    lines = []
    for padded, candidates, target in rows:
        history = padded[padded < len(prompts.titles)]
        items, offered = (";".join(f" {prompts.titles[i]}{mark}" for i in row) for row in (history, candidates))
        text = f"{prompts.tokenizer.bos_token or ''}{opening}{items}{offer}{offered}{question}"
        lines.append(text + (f" {prompts.titles[target]}{prompts.tokenizer.eos_token}" if answers else ""))
    return lines


def tokenised(model: LanguageRecommender, texts: list[str], padding_side: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask, (batch, longest)."""
    return model.prompts.tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side=padding_side, return_tensors="pt"
    )


def collate_text(model: LanguageRecommender, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Make a batch for `full_loss` from text."""
    prompts, batch = model.prompts, dict(tokenised(model, texts(model, rows, answers=True), "right"))
    ids, real = batch["input_ids"], batch.pop("attention_mask").bool()
    answers = prompts.tokenizer([f" {prompts.titles[target]}" for *_, target in rows], add_special_tokens=False)
    start = real.sum(1) - torch.tensor([len(tokens) + 1 for tokens in answers["input_ids"]])  # with the end
    batch["labels"] = ids.where(real & (torch.arange(ids.shape[1]) >= start[:, None]), NO_LABEL)
    batch["at"] = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    items = [int(item) for row in rows for item in (*row[0], *row[1])]
    batch["items"] = torch.tensor([item for item in items if item < len(prompts.titles)])
    batch["places"] = (ids.flatten() == prompts.item_token).nonzero()[:, 0]
    padding = [len(prompts.titles)]
    histories = [[*padding * model.encoder.window, *history][-model.encoder.window :] for history, *_ in rows]
    return batch | {"history": torch.tensor(np.array(histories))}


def full_loss(model: LanguageRecommender, batch: dict[str, Tensor], hybrid: bool) -> Tensor:
    """Mean over rows of -log P(answer), from all logits."""
    logits = model.logits(batch, hybrid)[:, :-1].float()
    labels = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    return loss / len(labels)


class Usual(transformers.Trainer):
    """Trainer on the curriculum of `fit`, with `full_loss`."""

    def compute_loss(self, model: LanguageRecommender, inputs: dict[str, Tensor], *_: object, **__: object) -> Tensor:
        step, total = self.state.global_step, self.state.max_steps
        hybrid = np.random.default_rng(combined_seed(self.args.seed, step)).random() < step / total
        return full_loss(model, inputs, hybrid)


class Clock(transformers.TrainerCallback):
    """The times at which steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


def train_by_trainer(model: LanguageRecommender, train: Questions, batch_size: int, epochs: int = 1) -> np.ndarray:
    """Returns the seconds of each step but the first."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=1e-3, seed=0,
            lr_scheduler_type="constant", use_cpu=model.device.type == "cpu", bf16=model.device.type == "cuda",
            remove_unused_columns=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Usual(model, arguments, lambda rows: collate_text(model, rows), train, callbacks=[clock]).train()
    model.eval()
    return np.diff(clock.times)


def train_by_fit(
    model: LanguageRecommender, train: Questions, batch_size: int, epochs: int = 1, micro_batch_size: int | None = None
) -> np.ndarray:
    """Returns the seconds of each step but the first. micro_batch_size: of prompts of like length, None for all."""
    arguments = TrainingArguments(
        epochs, batch_size, learning_rate=1e-3, warmup=0.0, schedule="constant", device=str(model.device),
        micro_batch_size=micro_batch_size, precision="bf16" if model.device.type == "cuda" else "no",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return np.diff(fit(model, train, arguments, Path(folder))["seconds"])


def answer_by_length(model: LanguageRecommender, questions: Questions, together: int) -> list[int | None]:
    """Greedy predictions in the batches of evaluation."""
    answers: list[int | None] = [None] * len(questions)
    for index, rows in batches_by_length(model, questions, together):
        for place, column in zip(index, model.generate(rows), strict=True):
            answers[place] = column
    return answers


class Apart:
    """A language recommender without the pass that both scores and writes."""

    def __init__(self, model: LanguageRecommender) -> None:
        self.score, self.generate, self.device = model.score, model.generate, model.device


# ---------------------------------------------------------------- serving


@torch.no_grad()
def prompts_of(model: LanguageRecommender, rows: Sequence[Row]) -> tuple[dict, Tensor]:
    """What the language model reads for these rows, and what their gate reads, (rows, gate_dim)."""
    batch = model.batch(rows)
    mask = (batch["part"] == PROMPT).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"inputs_embeds": model.embeds(batch, hybrid=True), "attention_mask": mask, "position_ids": positions}
    return inputs, model.encoder.encode(batch["history"])


@torch.no_grad()
def after_prompts(model: LanguageRecommender, inputs: dict, z: Tensor) -> dict:
    """The inputs after the prompts: the most likely token of each row, and the cache that contains its prompt."""
    cache = DynamicCache()
    token = model.language_model(**inputs, past_key_values=cache, sequence_embeds=z).logits[:, -1].argmax(-1)
    positions, mask = inputs["position_ids"][:, -1:] + 1, F.pad(inputs["attention_mask"], (0, 1), value=1)
    return {"input_ids": token[:, None], "position_ids": positions, "attention_mask": mask, "past_key_values": cache}


@torch.no_grad()
def next_logits(model: LanguageRecommender, inputs: dict, z: Tensor | None = None) -> Tensor:
    """Logits of the next token, (rows, vocabulary); z is None if a user's adapter is merged."""
    guidance = {} if z is None else {"sequence_embeds": z}
    logits = model.language_model(**inputs, **guidance, logits_to_keep=1).logits[:, -1]
    if "past_key_values" in inputs:
        inputs["past_key_values"].crop(-1)  # undo
    return logits


def serve_together(model: LanguageRecommender, inputs: dict, z: Tensor) -> Tensor:
    """`next_logits` of all users at once, as this package computes them."""
    return next_logits(model, inputs, z)


def serve_merged(model: LanguageRecommender, single: list[dict], z: Tensor) -> Tensor:
    """`next_logits` of one user at a time, with the adapter merged into the weights."""
    parts = []
    for row, inputs in enumerate(single):
        with model.language_model.base_model.sequence_embeds(z[[row]]):
            model.language_model.merge_adapter()
        parts.append(next_logits(model, inputs))
        model.language_model.unmerge_adapter()
    return torch.cat(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    numbers = {
        "examples": 1024,
        "questions": 128,
        "clients": 64,
        "batch_size": 32,
        "micro_batch_size": 32,
        "users": 2000,
    }
    parser = measure.parser(__doc__, rounds=5, **numbers)
    parser.add_argument("--base-model", default="embedded", help="name or folder of the base model (embedded)")
    parser.add_argument("--dataset", default="world", help="the data set (world)")
    parser.add_argument("--data-dir", default="", help="the folder with its files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (all)")
    options = parser.parse_args(arguments)
    changed = [
        value for value in (Path(options.base_model).name, options.dataset) if value not in ("embedded", "world")
    ]
    name = "_".join(["language", *changed])
    run, out = measure.start(name, options, "data_dir", "parts")
    bench, metrics = Bench(options), {}
    counted = {"training": bench.train, "serving": bench.clients, "next token": bench.clients}
    for part in options.parts:
        ways, agreement = PARTS[part](bench)
        metrics[part], results = measure.compare(ways, options.rounds, run.device, GOALS.get(part))
        if part == "training":
            bench.rates(metrics[part], results, matrix_rate(run.device))
        metrics[part]["rows"] = len(counted.get(part, bench.rows))
        metrics[part]["agreement"] = agreement(results)
        measure.show(part, metrics[part])
        run.save(metrics, path=out)
    print(out)


if __name__ == "__main__":
    main()
