"""Instance-wise LoRA for sequential recommendation: the method of Kong et al. (NeurIPS 2024), end to end."""

__version__ = "0.3.0"

from ilora.adapter import ILoraConfig, export_lora, gate_weights

__all__ = ["ILoraConfig", "export_lora", "gate_weights"]
