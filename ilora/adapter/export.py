"""What one user's adapter is: its gate weights, and a plain LoRA checkpoint of it."""

import dataclasses
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ilora.adapter.config import ILoraConfig
from ilora.adapter.layer import weighted_A
from ilora.adapter.model import ILoraModel
from ilora.errors import UserError


def _tuner_and_name(model: PeftModel, adapter_name: str | None) -> tuple[ILoraModel, str]:
    """The model's tuner, and the name of the given or the only active adapter.  Raises UserError."""
    if not isinstance(tuner := getattr(model, "base_model", None), ILoraModel):
        raise UserError(f"{type(model).__name__} has no iLoRA adapter: wrap it by get_peft_model and ILoraConfig.")
    names = tuner.active_adapters if adapter_name is None else [adapter_name]
    known = [name for name, config in tuner.peft_config.items() if isinstance(config, ILoraConfig)]
    if len(names) != 1 or names[0] not in known:
        raise UserError(f"{names} is not one iLoRA adapter: set adapter_name and name one of {', '.join(known)}.")
    return tuner, names[0]


def gate_weights(model: PeftModel, z: Tensor, adapter_name: str | None = None) -> Tensor:
    """w, as in eval mode, of z (b, d) under the active or named adapter: (b, K), or (layers, b, K) per layer."""
    tuner, name = _tuner_and_name(model, adapter_name)
    if name in tuner.lora_gate:
        return tuner.lora_gate[name].settled(z)
    return torch.stack([layer.lora_gate[name].settled(z) for layer in tuner.adapted_layers() if name in layer.lora_A])


def export_lora(model: PeftModel, z: Tensor, folder: str | Path, adapter_name: str | None = None) -> Path:
    """Write the adapter of one user, or a group's mean z (1, d), as a plain PEFT LoRA checkpoint, B diag(w) A."""
    tuner, name = _tuner_and_name(model, adapter_name)
    tensors = {}
    with torch.no_grad(), tuner.sequence_embeds(z):
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            if ".lora_A." in key:
                layer = tuner.get_submodule(key.removeprefix("base_model.").rsplit(".lora_A.", 1)[0])
                tensor = weighted_A(tensor, layer.conditioning.weights_of(layer, name, settled=True)).to(tensor.dtype)
            if ".lora_gate." not in key:
                tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    options = {f.name: getattr(tuner.peft_config[name], f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    LoraConfig(**{**options, "inference_mode": True}).save_pretrained(str(folder))
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(folder)
