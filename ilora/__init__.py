"""Instance-wise LoRA for sequential recommendation: the method of Kong et al. (NeurIPS 2024), end to end."""

__version__ = "0.1.0"
