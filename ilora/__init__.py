"""Instance-wise LoRA for sequential recommendation: the method of Kong et al. (NeurIPS 2024), end to end."""

__version__ = "0.3.0"

from ilora.adapter import ILoraConfig, export_lora, gate_weights

__all__ = ["ILoraConfig", "LanguageRecommender", "export_lora", "gate_weights"]


def __getattr__(name: str) -> type:
    """Import the recommender when it is used, so that the adapter alone needs no pandas."""
    if name != "LanguageRecommender":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ilora.language.recommender import LanguageRecommender

    return LanguageRecommender
