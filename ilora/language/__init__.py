"""Language models as recommenders: base models, prompts, the recommender around them, and its tuning."""

from importlib import import_module
from typing import Any

_PLACES = {
    "base_models": ("Projector", "load_language_model"),
    "prompts": ("ITEM_TOKEN", "NO_ITEM", "NO_LABEL", "PROMPT", "Prompts", "prompt_text", "read_answer", "wording"),
    "recommender": ("LanguageRecommender", "adapter_config"),
    "tuning": ("snapshots", "tuned", "tuned_folder", "untuned"),
}
__all__ = [
    "ITEM_TOKEN",
    "NO_ITEM",
    "NO_LABEL",
    "PROMPT",
    "LanguageRecommender",
    "Projector",
    "Prompts",
    "adapter_config",
    "load_language_model",
    "prompt_text",
    "read_answer",
    "snapshots",
    "tuned",
    "tuned_folder",
    "untuned",
    "wording",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that `python -m ilora.language.pretraining` runs a module not yet imported."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"ilora.language.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
