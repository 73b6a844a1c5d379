"""The steps that notebooks share; what takes long is made once and found again by its parameters.

A notebook asked for alone makes what it needs through these functions; one run after the others finds it made.
"""

import hashlib
import shutil
from pathlib import Path

import pandas as pd

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.data.windows import questions
from ilora.errors import UserError
from ilora.evaluation import evaluate
from ilora.language import base_models, pretraining
from ilora.language.prompts import Prompts
from ilora.language.recommender import LanguageRecommender, adapter_config
from ilora.recommenders.base import SequenceModel
from ilora.training.loop import TrainingArguments, fit

VALIDATION_LIMIT = 1000  # questions asked after each epoch
SNAPSHOTS = 4  # states of an adapter kept on the way


def untuned(
    dataset: Dataset, base_model: str = "embedded", encoder: SequenceModel | None = None, device: str = "auto"
) -> LanguageRecommender:
    """The language model as it is, with text-only prompts unless an encoder is given."""
    model, tokenizer = base_models.load_language_model(base_model, dataset, device)
    prompts = Prompts(tokenizer, list(dataset.items["title"]), dataset.noun, dataset.verb)
    return LanguageRecommender(model, prompts, encoder)


def tuned(
    dataset: Dataset,
    encoder: SequenceModel | None,
    base_model: str = "embedded",
    device: str = "auto",
    **settings: int | float | str,
) -> tuple[LanguageRecommender, pd.DataFrame]:
    """A language model tuned as `tuned_folder` does it, and its history; loaded only if it was not trained just now."""
    folder, model = _tune(dataset, encoder, base_model, device=device, **settings)
    if model is None:
        model = LanguageRecommender.from_pretrained(folder / "recommender", base_model, device, dataset)
    return model, pd.read_csv(folder / "history.csv")


def snapshots(dataset: Dataset, encoder: SequenceModel | None, **settings: int | float | str) -> list[Path]:
    """What training kept of the model on the way, earliest first; settings as for `tuned`.

    Files for `training.load_snapshot`, evenly spaced; the last one is of the last step, be it the best or not.
    """
    return sorted((tuned_folder(dataset, encoder, **settings) / "snapshots").iterdir())


def tuned_folder(
    dataset: Dataset, encoder: SequenceModel | None, base_model: str = "embedded", **settings: int | float | str
) -> Path:
    """The folder of a language model tuned with LoRA (experts 1) or iLoRA as LLaRA does; made once and kept.

    Without an encoder prompts are text alone, as TALLRec has them. window: items of a history; 0 for the encoder's.
    It holds recommender/, history.csv and snapshots/step-*.safetensors.
    Validation, HitRatio@1 by ranking after each epoch, chooses the epoch. Parameters are those of the notebooks.
    """
    return _tune(dataset, encoder, base_model, **settings)[0]


def _tune(
    dataset: Dataset,
    encoder: SequenceModel | None,
    base_model: str = "embedded",
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    experts: int = 1,
    gate: str = "linear",
    gate_per_layer: bool = False,
    gate_top_k: int = 0,
    guidance: str = "sequence",
    epochs: int = 1,
    learning_rate: float = 3e-3,
    batch_size: int = 32,
    train_limit: int = 0,
    seed: int = 0,
    device: str = "auto",
    micro_batch_size: int = 32,
    window: int = 0,
    compile: str = "auto",
    target_modules: str | list[str] = "all-linear",
) -> tuple[Path, LanguageRecommender | None]:
    """See `tuned_folder`; and the model, if this process has just trained it."""
    if encoder is None and (experts > 1 or not window):
        raise UserError("without an encoder give a window, and one expert: there is nothing for a gate to read")
    train = questions(dataset, "train", window or encoder.window, train_limit, seed=seed)
    validation = questions(dataset, "validation", window or encoder.window, VALIDATION_LIMIT, seed=seed)
    on_gpu = devices.pick_device(device).type == "cuda"
    arguments = TrainingArguments(
        epochs, batch_size, learning_rate, weight_decay=1e-5, seed=seed, precision="bf16" if on_gpu else "no",
        snapshots=SNAPSHOTS, micro_batch_size=micro_batch_size, save_every=100, device=device,
        compile=compile,
    )  # fmt: skip
    adapter = {"rank": rank, "alpha": alpha, "dropout": dropout, "experts": experts}
    gates = {"gate": gate, "gate_per_layer": gate_per_layer, "gate_top_k": gate_top_k}
    adapter |= {name: value for name, value in gates.items() if value} if experts > 1 else {}
    adapter |= {"target_modules": target_modules} if target_modules != "all-linear" else {}
    guided = {"guidance": guidance} if experts > 1 and guidance != "sequence" else {}
    limits = {"window": window or encoder.window, "train": len(train), "validation": len(validation)}
    settings = {**adapter, **guided, **limits, **arguments.identity()}
    inputs = {"data": dataset.key, "base_model": pretraining.base_content(base_model)}
    if encoder is not None:
        inputs["encoder"] = _content(encoder)

    work = artifacts.home() / "training" / artifacts.key(settings, inputs)

    trained = []

    def make(folder: Path) -> None:
        asked = untuned(dataset, base_model, encoder, device)
        config = adapter_config(**adapter)
        model = LanguageRecommender(asked.language_model, asked.prompts, encoder, config, seed, **guided)
        for epoch in reversed(range(epochs)):  # before any work: the candidates of each epoch, and the first ones last
            train.set_epoch(epoch)
            model.check(train)
        model.check(validation)

        def validate() -> float:
            return evaluate(model, validation, generate=False)["hit"].mean()

        history = fit(model, train, arguments, work, validate)
        history.to_csv(folder / "history.csv", index=False)
        model.save_pretrained(folder / "recommender", base_model)
        shutil.copytree(work / "snapshots", folder / "snapshots")
        trained.append(model)

    kind = "LoRA" if experts == 1 else f"iLoRA with {experts} experts"
    folder = artifacts.cached("adapters", settings, inputs, make, note=f"{kind} on {dataset.name}")
    shutil.rmtree(work, ignore_errors=True)
    return folder, trained[0] if trained else None


def _content(encoder: SequenceModel) -> str:
    """Digest of an encoder's class, configuration and weights."""
    digest = hashlib.sha256(artifacts.digest([type(encoder).__name__, encoder.config]).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
