"""Gates: from the representation of a row's history to the weights of its experts (Eq. 11).

    z  (b, d)  representations, d = gate_dim
    w  (b, K)  weights of the K experts, non-negative, each row sums to 1

A new kind of gate is a subclass of `Gate` with a `kind` and `logits`; from its definition on,
`ILoraConfig(gate=kind)` finds it, and it is trained, saved and loaded with its adapter.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilora.errors import UserError


def check_representations(z: Tensor, width: int | None = None, finite: bool = False) -> None:
    """Raise UserError unless z is a floating-point tensor (batch, width), with `finite` one without NaN."""
    wanted = f"(batch, {width or 'gate_dim'})"
    if not isinstance(z, Tensor) or not z.is_floating_point():
        kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise UserError(
            f"sequence_embeds must be a floating-point tensor of shape {wanted}, not {kind}: convert it by "
            "torch.as_tensor(z, dtype=torch.float32)."
        )
    if z.dim() != 2 or (width is not None and z.shape[1] != width):
        raise UserError(
            f"sequence_embeds must have shape {wanted}, not {tuple(z.shape)}: "
            "pass one representation of gate_dim values per row."
        )
    if finite and not z.isfinite().all():
        raise UserError("sequence_embeds has values that are not finite: correct the encoder that computes them.")


class GateSettings(Protocol):
    """What a gate reads of an adapter's configuration."""

    gate: str
    gate_dim: int
    num_experts: int
    gate_top_k: int | None


class Gate(nn.Module):
    """softmax(logits(z)): logits in the type of the gate's parameters, the softmax in float32 or better.

    Autocast changes neither. With gate_top_k the softmax is over the k largest logits, and the other experts get 0.
    Raises UserError if z is not a floating-point tensor of shape (b, gate_dim).
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["Gate"]]] = {}

    def __init_subclass__(cls) -> None:
        Gate.kinds[cls.kind] = cls

    def __init__(self, config: GateSettings) -> None:
        super().__init__()
        self.gate_dim, self.top_k = config.gate_dim, config.gate_top_k

    def logits(self, z: Tensor) -> Tensor:
        """z (b, d) -> (b, K), before the softmax."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        check_representations(z, self.gate_dim)
        parameter = next(self.parameters(), z)
        z = z.to(parameter.dtype if parameter.is_meta else parameter)  # accelerate brings z to an offloaded gate
        with torch.autocast(z.device.type, enabled=False):
            logits = self.logits(z)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.top_k is not None:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(dim=-1)


class LinearGate(Gate):
    """The paper's gate, softmax(W_g z) with W_g (K, d) and no bias (Eq. 11).

    W_g starts like any nn.Linear, uniform in +-1/sqrt(d), as the paper's code does. (Zeros would make the
    first step exactly LoRA's; B = 0 makes the first output the base model's either way.) Mind the norm of z:
    for d = 64 the logits start with a standard deviation of 0.07 |z|, so 0.6 for |z| = 8 but 3.6 for
    |z| = 50, where the softmax is nearly one-hot and learns slowly.
    """

    kind = "linear"

    def __init__(self, config: GateSettings) -> None:
        super().__init__(config)
        self.W_g = nn.Linear(config.gate_dim, config.num_experts, bias=False)

    def logits(self, z: Tensor) -> Tensor:
        return self.W_g(z)


class _ResidualBlock(nn.Module):
    """(b, c_in, length) -> (b, c_out, length / 2): two normed convolutions beside a strided shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(c_out), nn.ReLU(),
            nn.Conv1d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm1d(c_out),
        )  # fmt: skip
        self.shortcut = nn.Conv1d(c_in, c_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class ConvolutionalGate(Gate):
    """The released code's gate: a 1-D ResNet of three stages with batch norm along z, linear, softmax.

    The widths are ours. In training mode batch norm mixes the rows of a batch, so a user's weights depend
    on the others; in evaluation mode they do not.
    """

    kind = "convolutional"
    widths = (1, 16, 32, 64)

    def __init__(self, config: GateSettings) -> None:
        super().__init__(config)
        self.stages = nn.Sequential(*map(_ResidualBlock, self.widths[:-1], self.widths[1:]))
        self.head = nn.Linear(self.widths[-1], config.num_experts)

    def logits(self, z: Tensor) -> Tensor:
        return self.head(self.stages(z.unsqueeze(1)).mean(dim=-1))


def make_gate(config: GateSettings, like: Tensor) -> Gate:
    """A gate on the device and in the type of the tensor `like` (on meta while PEFT builds an empty model)."""
    gate = Gate.kinds[config.gate](config)
    if any(parameter.is_meta for parameter in gate.parameters()):
        return gate
    return gate.to(like.device, like.dtype)
