"""The systems of the paper's Table 1: how each is made from a data set, a seed and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ilora import data, evaluation
from ilora.errors import UserError
from ilora.language import tuning
from ilora.recommenders.base import Recommender
from ilora.recommenders.baselines import Popularity
from ilora.recommenders.training import EPOCHS, choose_regularisation, fit_recommender
from ilora.study.chat import ChatRec

SETTINGS = {  # notebook parameters that `python -m ilora table` has, with their defaults
    "conflict": 0.5, "users": 2000, "repeats": "keep", "window": 10,
    "base_model": "embedded", "rank": 8, "alpha": 32.0, "dropout": 0.0, "experts": 4,
    "epochs": 1, "learning_rate": 3e-3, "batch_size": 32, "train_limit": 20000, "test_limit": 1000,
    "micro_batch_size": 32, "gradient_checkpointing": False, "quantize": "", "compile": "auto", "device": "auto",
    "text_encoder": "sentence-transformers/all-MiniLM-L6-v2", "chat_url": "", "chat_model": "", "chat_limit": 100,
}  # fmt: skip
VARIANTS = {  # of iLoRA, which the ablations compare
    "K = 2": {"experts": 2}, "K = 8": {"experts": 8}, "gate per layer": {"gate_per_layer": True},
    "convolutional gate": {"gate": "convolutional"}, "gate by cluster": {"gate": "clusters"},
    "top-2 gate": {"gate_top_k": 2}, "random guidance": {"guidance": "random"}, "token guidance": {"guidance": "token"},
}  # fmt: skip
TUNING = ("base_model", "rank", "alpha", "dropout", "epochs", "learning_rate", "batch_size", "train_limit", "quantize")
ROUNDING_ONLY = ("device", "micro_batch_size", "gradient_checkpointing", "compile")  # what they change is rounding


@dataclass(frozen=True)
class System:
    """A row of the table: `make(dataset, seed, settings)` returns a system that can be evaluated."""

    make: Callable[[data.Dataset, int, Mapping[str, Any]], evaluation.System]
    uses: tuple[str, ...] = ()  # settings that decide its result, besides those of data and questions
    seeds: bool = True  # whether it is trained, so that runs with other seeds differ
    sample: str = ""  # the setting with the number of questions that it is evaluated on, sampled at random; "": all
    recommender: str = ""  # its recommender whose dropout and L2 are chosen on validation


def trained(dataset: data.Dataset, seed: int, settings: Mapping[str, Any], kind: str) -> Recommender:
    """A recommender without language, with dropout and L2 chosen on validation with seed 0."""
    options = _chosen(settings, "window", "device")
    if kind == "MoRec":  # its text encoder is too large for a grid of trainings
        options |= _chosen(settings, "text_encoder")
    else:
        options |= choose_regularisation(dataset, kind, **options)[0]
    model, history = fit_recommender(dataset, seed, kind=kind, epochs=EPOCHS[kind], **options)
    model.validation = history["hit_ratio"].dropna().tolist()
    return model


def _chosen(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}


def _recommender(kind: str) -> System:
    make = partial(trained, kind=kind)
    return System(make, ("text_encoder",)) if kind == "MoRec" else System(make, recommender=kind)


def _tuned(encoder: str = "", *gate: str, **fixed: Any) -> System:
    """A language model with an adapter: on hybrid prompts with an encoder's item embeddings, or on text alone."""

    def make(dataset: data.Dataset, seed: int, settings: Mapping[str, Any]) -> evaluation.System:
        items = trained(dataset, seed, settings, encoder) if encoder else None
        adapter = tuning.AdapterSettings(**_chosen(settings, "rank", "alpha", "dropout", *gate) | fixed)
        training = _chosen(settings, "epochs", "batch_size", "learning_rate", *ROUNDING_ONLY)
        arguments = tuning.tuning_arguments(**training, seed=seed)
        sizes = _chosen(settings, "base_model", "window", "train_limit", "quantize")
        model, history, _ = tuning.tune(dataset, items, adapter, arguments, **sizes)
        model.validation = history["hit_ratio"].dropna().tolist()
        return model

    return System(make, (*TUNING, *gate), recommender=encoder)


def _chat(dataset: data.Dataset, seed: int, settings: Mapping[str, Any]) -> evaluation.System:
    if not settings["chat_url"] or not settings["chat_model"]:
        raise UserError("ChatRec needs an endpoint: name it with -p chat_url URL and -p chat_model NAME")
    titles = list(dataset.items["title"])
    return ChatRec(settings["chat_url"], settings["chat_model"], titles, dataset.noun, dataset.verb)


SYSTEMS = {
    "Popularity": System(lambda dataset, seed, settings: Popularity.from_dataset(dataset), seeds=False),
    **{kind: _recommender(kind) for kind in ("GRU4Rec", "Caser", "SASRec", "MoRec")},
    "Language model": System(  # the paper's Llama2
        lambda dataset, _, settings: tuning.untuned(dataset, **_chosen(settings, "base_model", "device", "quantize")),
        ("base_model", "quantize"), seeds=False),
    "ChatRec": System(_chat, ("chat_url", "chat_model", "chat_limit"), seeds=False, sample="chat_limit"),
    "TALLRec": _tuned(),
    "LLaRA (GRU4Rec)": _tuned("GRU4Rec"),
    "LLaRA (Caser)": _tuned("Caser"),
    "LLaRA": _tuned("SASRec"),
    "iLoRA": _tuned("SASRec", "experts"),
    **{f"iLoRA, {name}": _tuned("SASRec", **{"experts": 4} | setting) for name, setting in VARIANTS.items()},
}  # fmt: skip
TABLE = [name for name in SYSTEMS if name != "ChatRec" and "," not in name]  # Table 1 without what needs an endpoint
