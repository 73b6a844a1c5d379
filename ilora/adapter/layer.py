"""The mathematics of one adapted layer, Eq. 12: LoRA whose middle is weighted separately for every row."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from ilora.errors import UserError


class ILoraVariant(LoraVariant):
    """What PEFT calls for each adapted layer and adapter."""

    merged: Tensor | None = None  # w (1, K) of the user that is merged into the base weight

    def supports_lora_conversion(self) -> bool:
        return False

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Step aside where the layer is wrapped again under this name."""
        del module.lora_variant[adapter_name]

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x (b, s, d_in), result (b, s, d_out) -> result + K alpha/r B diag(w) A dropout(x), Eq. 12."""
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.get_autocast_dtype(x.device.type)
        if module.cast_input_dtype_enabled is not False and not autocast:  # which would cast x back at once
            x = x.to(A.weight.dtype)
        middle = A(module.lora_dropout[active_adapter](x))  # (b, s, r)
        factor = module.conditioning.factor(module, active_adapter, middle)
        if factor.dim() < middle.dim():  # compiled: each row has its own B, in fewer kernels than below
            rows_B = factor[:, None, :, None] * B.weight.unflatten(1, (factor.shape[1], -1))  # (b, d_out, K, r / K)
            return result + torch.einsum("b...r,bor->b...o", middle, rows_B.flatten(2).to(middle.dtype))
        return result + B(middle * factor)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.merged = module.conditioning.weights_of(module, active_adapter, settled=True).detach()
        return orig_weight + self._delta(module, active_adapter).to(orig_weight)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight.data - self._delta(module, active_adapter).to(orig_weight)

    def _delta(self, module: LoraLayer, adapter: str) -> Tensor:
        """dW of the merged user, laid out like the base weight: (d_out, d_in), for Conv1D (d_in, d_out)."""
        A = weighted_A(module.lora_A[adapter].weight, self.merged)
        delta = module.scaling[adapter] * module.lora_B[adapter].weight.to(A.dtype) @ A
        return (delta.T if module.fan_in_fan_out else delta).detach()


class InputCasts:
    """A layer's `cast_input_dtype_enabled`: true, and PEFT casts x, if the layer has a plain LoRA adapter too."""

    def __init__(self, layer: LoraLayer) -> None:
        self.adapters, self.variants = layer.lora_A, layer.lora_variant

    def __bool__(self) -> bool:
        return len(self.adapters) > len(self.variants)


def weighted_A(A: Tensor, w: Tensor) -> Tensor:
    """A (r, d_in), w (1, K) -> diag(K w, each repeated p times) A, in float32 or better."""
    if len(w) != 1:
        raise UserError("merging and export are for exactly one user: give z of shape (1, gate_dim).")
    return (w.numel() * w[0]).repeat_interleave(len(A) // w.numel()).unsqueeze(1).to(A.device) * A
