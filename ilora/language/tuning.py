"""Tuning a language model as a recommender, once for each combination of data, models and settings."""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ilora import artifacts, devices
from ilora.data import Dataset, questions
from ilora.errors import UserError
from ilora.evaluation import evaluate
from ilora.language.adapted_layers import adapter_config
from ilora.language.base_models import load_language_model
from ilora.language.pretraining import base_content
from ilora.language.prompts import Prompts
from ilora.language.recommender import LanguageRecommender
from ilora.recommenders.base import SequenceModel
from ilora.training.loop import TrainingArguments, fit


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter: LoRA for one expert, else iLoRA, which alone uses the four settings of the gate."""

    rank: int = 8  # r, all experts together
    alpha: float = 32  # updates are scaled by alpha / rank
    dropout: float = 0.0  # a share
    experts: int = 1  # K, a divisor of rank
    gate: str = "linear"  # or "convolutional", or "clusters"
    gate_per_layer: bool = False
    gate_top_k: int = 0  # experts with weight for one history; 0: all
    guidance: str = "sequence"  # what the gate gets, one of recommender.GUIDANCE
    target_modules: str | list[str] = "all-linear"  # see `adapted_layers.adapted`

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: a gate's only if there is one, newer ones only if changed."""
        newer = {"gate_per_layer": False, "gate_top_k": 0, "guidance": "sequence", "target_modules": "all-linear"}
        ignored = {"gate", *newer} - {"target_modules"} if self.experts == 1 else set()
        ignored |= {name for name, value in newer.items() if getattr(self, name) == value}
        return {name: value for name, value in asdict(self).items() if name not in ignored}


def tuning_arguments(
    epochs: int = 1, batch_size: int = 32, learning_rate: float = 3e-3, device: str = "auto", **changes: Any
) -> TrainingArguments:
    """Training as in LLaRA: weight decay on the projector, bf16 on a GPU; four snapshots. changes: other arguments."""
    kind, rows = devices.pick_device(device).type, changes.pop("micro_batch_size", 32)
    usual = {"weight_decay": 1e-5, "precision": "bf16" if kind == "cuda" else "no", "snapshots": 4, "save_every": 100}
    usual["micro_batch_size"] = min(rows, 8) if rows and kind == "cpu" else rows  # what fits into a CPU's cache
    return TrainingArguments(epochs, batch_size, learning_rate, device=device, **usual | changes)


def untuned(
    dataset: Dataset, base_model: str = "embedded", encoder: SequenceModel | None = None, device: str = "auto",
    quantize: str = "", **more: Any,
) -> LanguageRecommender:  # fmt: skip
    """The recommender before tuning, with text-only prompts unless an encoder is given. more: see its constructor."""
    model, tokenizer = load_language_model(base_model, dataset, device, quantize)
    prompts = Prompts(tokenizer, list(dataset.items["title"]), dataset.noun, dataset.verb)
    return LanguageRecommender(model, prompts, encoder, **more)


def tune(
    dataset: Dataset, encoder: SequenceModel | None, adapter: AdapterSettings, arguments: TrainingArguments,
    base_model: str = "embedded", window: int = 0, train_limit: int = 0, quantize: str = "",
) -> tuple[LanguageRecommender, pd.DataFrame, list[Path]]:  # fmt: skip
    """Tune a language model as LLaRA or, with several experts, iLoRA; trained once and kept.

    encoder: None for text-only prompts, as in TALLRec. window: items of a history, 0 for the encoder's. train_limit:
    training questions, 0 for all. quantize: see `load_language_model`. Returns the model of the epoch with the highest
    HitRatio@1 on validation, the history of training and the files for `training.load_snapshot`. Raises UserError
    if a gate or the window needs an encoder.
    """
    if encoder is None and (adapter.experts > 1 or not window):
        raise UserError("without an encoder give a window, and one expert: there is nothing for a gate to read")
    window, seed = window or encoder.window, arguments.seed
    train = questions(dataset, "train", window, train_limit, seed=seed)
    validation = questions(dataset, "validation", window, limit=1000, seed=seed)  # after each epoch
    sizes = {"window": window, "train": len(train), "validation": len(validation)}
    settings = adapter.identity() | sizes | arguments.identity() | ({"quantize": quantize} if quantize else {})
    inputs = {"data": dataset.content, "base_model": base_content(base_model)}
    if encoder is not None:  # a digest of its class, configuration and weights
        about = artifacts.digest([type(encoder).__name__, encoder.config]).encode()
        weights = (name.encode() + value.cpu().numpy().tobytes() for name, value in encoder.state_dict().items())
        inputs["encoder"] = hashlib.sha256(b"".join([about, *weights])).hexdigest()[:12]
    model = None  # unless it is trained here

    def make(folder: Path, work: Path) -> None:
        nonlocal model
        chosen = adapter.identity() | ({} if encoder is None else {"gate_dim": encoder.config["dim"]})
        start = {"guidance": chosen.pop("guidance", "sequence"), "adapter": adapter_config(**chosen), "seed": seed}
        model = untuned(dataset, base_model, encoder, arguments.device, quantize, **start)
        model.fit_gate(train)
        for epoch in reversed(range(arguments.epochs)):  # before training: the candidates of each epoch, the first last
            train.set_epoch(epoch)
            model.check(train)
        model.check(validation)
        longest = sorted(range(len(validation)), key=lambda row: -model.length(validation[row]))
        validate = {"validate": lambda: evaluate(model, validation, generate=False)["hit"].mean()}
        validate |= {"try_validation": lambda: evaluate(model, validation.take(longest[: 2 * model.batch_size]))}
        fit(model, train, arguments, work, **validate).to_csv(folder / "history.csv", index=False)
        model.save_pretrained(folder / "recommender", base_model)
        shutil.copytree(work, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", ".*"))

    kind = "LoRA" if adapter.experts == 1 else f"iLoRA with {adapter.experts} experts"
    folder = artifacts.cached("adapters", settings, inputs, make, note=f"{kind} on {dataset.name}")
    if model is None:
        model = LanguageRecommender.from_pretrained(folder / "recommender", base_model, arguments.device, dataset)
        model.batch_size = arguments.micro_batch_size or model.batch_size
    return model, pd.read_csv(folder / "history.csv"), sorted(folder.glob("snapshots/step-*"))
