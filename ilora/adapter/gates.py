"""Gates: from the representation z (b, d) of each row's history to the weights w (b, K) of its experts (Eq. 11)."""

import threading

import torch
from torch import Tensor, nn

from ilora.adapter.config import ILoraConfig
from ilora.errors import UserError


def check_representations(z: Tensor, width: int | None = None) -> None:
    """Raise UserError unless z is a floating-point tensor (batch, width)."""
    expected = f"sequence_embeds must be a floating-point tensor of shape (batch, {width or 'gate_dim'})"
    if not isinstance(z, Tensor) or not z.is_floating_point():
        kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise UserError(f"{expected}, not {kind}: convert it by torch.as_tensor(z, dtype=torch.float32).")
    if z.dim() != 2 or (width is not None and z.shape[1] != width):
        raise UserError(f"{expected}, not {tuple(z.shape)}: pass one per row, and set gate_dim to their width.")


class PerThread(threading.local):
    """Values of each thread, innermost last; a copied or pickled one starts with None."""

    def __init__(self) -> None:
        self.values: list = [None]

    def __reduce__(self) -> tuple:
        return PerThread, ()


class Gate(nn.Module):
    """softmax(logits(z)) of the gate_top_k largest logits; subclasses define `logits`: z (b, d) -> (b, K)."""

    def __init__(self, config: ILoraConfig) -> None:
        super().__init__()
        self.gate_dim, self.top_k = config.gate_dim, config.gate_top_k
        self.applied = PerThread()  # w (b, K) of the running pass, where `weights_of_all` made it

    def forward(self, z: Tensor, **given: Tensor) -> Tensor:
        check_representations(z, self.gate_dim)
        parameter = next(self.parameters(), z)
        z = z.to(parameter.dtype if parameter.is_meta else parameter)  # accelerate brings z to an offloaded gate
        with torch.autocast(z.device.type, enabled=False):
            logits = self.logits(z, **given)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.top_k is not None:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(dim=-1)

    def settled(self, z: Tensor) -> Tensor:
        """w (b, K) in eval mode, where batch norm neither mixes rows nor learns from them; the mode stays as it is."""
        training = self.training
        try:
            return self.eval()(z)
        finally:
            self.train(training)


class LinearGate(Gate):
    """Eq. 11: softmax(W_g z) with W_g (K, d), at the start uniform in +-1/sqrt(d) as in the paper's code."""

    def __init__(self, config: ILoraConfig) -> None:
        super().__init__(config)
        self.W_g = nn.Linear(config.gate_dim, config.num_experts, bias=False)

    def logits(self, z: Tensor, stacked: Tensor | None = None) -> Tensor:
        return self.W_g(z) if stacked is None else (stacked @ z.mT).mT  # of (L, K, d); gradients come contiguous


class _ResidualBlock(nn.Module):
    """(b, c_in, length) -> (b, c_out, length / 2): two normed convolutions and a strided shortcut, added."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(c_out), nn.ReLU(),
            nn.Conv1d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm1d(c_out),
        )  # fmt: skip
        self.shortcut = nn.Conv1d(c_in, c_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


class ConvolutionalGate(Gate):
    """The released code's gate, a 1-D ResNet of our widths; in training, its batch norm makes rows depend on others."""

    def __init__(self, config: ILoraConfig) -> None:
        super().__init__(config)
        self.stages = nn.Sequential(_ResidualBlock(1, 16), _ResidualBlock(16, 32), _ResidualBlock(32, 64))
        self.head = nn.Linear(64, config.num_experts)

    def logits(self, z: Tensor) -> Tensor:
        return self.head(self.stages(z.unsqueeze(1)).mean(dim=-1))


class ClusterGate(Gate):
    """Routing without learning: all weight for one expert, that of the nearest centre; the caller places them."""

    def __init__(self, config: ILoraConfig) -> None:
        super().__init__(config)
        self.register_buffer("centres", torch.full((config.num_experts, config.gate_dim), torch.nan))

    def logits(self, z: Tensor) -> Tensor:
        distance = torch.cdist(z.float(), self.centres.float())  # (b, K)
        return torch.zeros_like(distance).where(distance == distance.amin(dim=1, keepdim=True), -torch.inf)


def weights_of_all(gates: list[Gate], z: Tensor) -> Tensor | None:
    """w (L, b, K) of L linear gates in few large kernels; None if they are of another kind, apart or cut up by FSDP."""
    weights = [W for gate in gates if type(gate) is LinearGate and (W := gate.W_g.weight).dim() == 2 and not W.is_meta]
    alike = len(weights) == len(gates) and len({(W.dtype, W.device, W.shape) for W in weights}) == 1
    whole = all(type(W) is nn.Parameter and not hasattr(W, "_fsdp_flattened") for W in weights)
    return gates[0].forward(z, stacked=torch.stack(weights)) if alike and whole else None


GATE_CLASSES = {"linear": LinearGate, "convolutional": ConvolutionalGate, "clusters": ClusterGate}  # ILoraConfig.gate
