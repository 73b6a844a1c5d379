"""Language models as recommenders: base models, prompts, the recommender around them, and its tuning."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "ITEM_TOKEN": "prompts", "NO_LABEL": "prompts", "PROMPT": "prompts", "Prompts": "prompts",
    "prompt_text": "prompts", "read_answer": "prompts", "wording": "prompts",
    "Projector": "base_models", "load_language_model": "base_models",
    "LanguageRecommender": "recommender", "adapter_config": "adapted_layers",
    "AdapterSettings": "tuning", "tune": "tuning", "tuning_arguments": "tuning", "untuned": "tuning",
}  # fmt: skip
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a name when it is used, so that `python -m ilora.language.pretraining` runs a module not yet imported."""
    if name in _MODULE_OF:
        return getattr(import_module(f"ilora.language.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
