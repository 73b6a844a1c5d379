"""Carries the representations of a batch's rows from the caller to every adapted layer."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ilora.adapter.gates import Gate, PerThread, weights_of_all
from ilora.errors import UserError


@dataclass(eq=False)
class Condition:
    """What the rows of a batch are conditioned on."""

    z: Tensor  # (b, d)
    weights: dict[str, Tensor] = field(default_factory=dict)  # adapter -> w (b, K) or, of its L layers, (L, b, K)
    slices: dict[Gate, Tensor] = field(default_factory=dict)  # gate of a layer -> its w (b, K) of those
    task: asyncio.Task | None = None  # of a context: the asyncio task that entered it
    factors: dict[tuple, dict[Gate, list[Tensor]]] | None = None  # of a forward: not yet used, see `factor`


class Conditioning:
    """Carries z from the callers of all wrappers of a base model to its layers; refers to neither: they can be freed.

    model(ids, sequence_embeds=z)        with model.sequence_embeds(z): model(ids)
                +-------> hook of the base model <-------------+
                 Condition: z (b, d), w = gate(z) (b, K)         one for each thread
          +-------------------------+-------------------------+
    adapted layer:            adapted layer:     ...    adapted layer:
    middle * factor           middle * factor           middle * factor
    """

    def __init__(self, model: nn.Module) -> None:
        self.gates = nn.ModuleDict()  # adapter -> its gate, where all layers share one
        self.layer_gates: dict[str, list[Gate]] = {}  # adapter -> the gates of its layers, where each has its own
        self.active: list[str] = []  # the active adapters
        self.merged: list[list[str]] = []  # for each adapted layer PEFT's list of the adapters merged into it
        self.least_dim = 3 if hasattr(model, "prepare_inputs_for_generation") else 2  # (b, s, d_in) or (b, d_in)
        self._conditions = PerThread()  # compiled code reads no context variable
        checkpointed = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        self._hooks = [
            model.register_forward_pre_hook(partial(self._begin_forward, checkpointed), with_kwargs=True),
            model.register_forward_hook(self._end_forward, always_call=True),
        ]

    def disconnect(self, model: nn.Module) -> None:
        """Remove the hooks from the base model."""
        for hook in self._hooks:
            hook.remove()
        for part in model.modules():
            if isinstance(function := vars(part).get("_gradient_checkpointing_func"), CarryingCheckpoint):
                part._gradient_checkpointing_func = function.checkpoint

    @property
    def running(self) -> Condition | None:
        return self._conditions.values[-1]

    @contextmanager
    def under(self, condition: Condition) -> Iterator[None]:
        try:
            self._push(condition)
            yield
        finally:
            while condition in self._conditions.values:  # another thread, or an outer context that ended first, has not
                self._pop()

    def _push(self, condition: Condition) -> None:  # compiled layers find their w at their gate
        for name in condition.weights.keys() - self.gates.keys() if not condition.slices else ():
            condition.slices |= zip(self.layer_gates[name], condition.weights[name].unbind(), strict=True)
        for gate, w in condition.slices.items():
            gate.applied.values.append(w)
        self._conditions.values.append(condition)  # last, and popped first: an interrupted one belongs to no pass

    def _pop(self) -> None:
        for gate in self._conditions.values.pop().slices:
            gate.applied.values.pop()

    def representations(self, z: Tensor | None) -> Tensor | None:
        """The z of a starting call, else the context's.  Raises UserError for NaN on a CPU, or if merged."""
        self._end_forward()  # one that was interrupted
        if getattr(z, "is_cpu", False) and not torch.compiler.is_compiling() and not math.isfinite(z.sum(dtype=float)):
            raise UserError("sequence_embeds has values that are not finite: correct the encoder that computes them.")
        context = self.running
        if context is not None and not torch.compiler.is_compiling() and context.task is not current_task():
            raise UserError("another asyncio task is inside `with model.sequence_embeds(z):`: do not await inside it.")
        z = context.z if z is None and context is not None else z
        if z is not None and any(self.merged):
            raise UserError("the adapter is merged for one user: call model.unmerge_adapter() to serve others.")
        return z

    def _begin_forward(self, checkpointed: list[nn.Module], _: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Take `sequence_embeds` out of the base model's keywords and apply the gates to it."""
        if (z := self.representations(kwargs.pop("sequence_embeds", None))) is not None:
            weights = {name: self.gates[name](z) for name in self.active if name in self.gates}
            for name in self.active if not torch.compiler.is_compiling() else ():
                if (w := weights_of_all(self.layer_gates.get(name, []), z)) is not None:
                    weights[name] = w
                else:  # for good: a gate that FSDP 2 left gathered looks whole, but its gradient is due with its layer
                    self.layer_gates[name] = []
            self._push(Condition(z, weights, factors={}))
        for part in checkpointed if not torch.compiler.is_compiling() else ():
            function = vars(part).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, CarryingCheckpoint):
                part._gradient_checkpointing_func = CarryingCheckpoint(self, function)
        return args, kwargs

    def _end_forward(self, *_: Any) -> None:
        while self.running is not None and self.running.factors is not None:
            self._pop()

    def gate_of(self, layer: LoraLayer, adapter: str) -> Gate:
        return self.gates[adapter] if adapter in self.gates else layer.lora_gate[adapter]

    def weights_of(self, layer: LoraLayer, adapter: str, settled: bool = False) -> Tensor:
        """w (b, K) of an adapted layer; settled: outside a pass, in eval mode."""
        if (condition := self.running) is None:
            remedy = "call inside `with model.sequence_embeds(z):` (in a Trainer, also set remove_unused_columns=False)"
            raise UserError(f"iLoRA got no representations: pass sequence_embeds=z (batch, gate_dim), or {remedy}.")
        gate = self.gate_of(layer, adapter)
        if settled or adapter not in condition.weights:
            return (gate.settled if settled else gate)(condition.z)
        return condition.weights[adapter] if adapter in self.gates else gate.applied.values[-1]

    def factor(self, layer: LoraLayer, adapter: str, middle: Tensor) -> Tensor:
        """K alpha/r w: for a middle (b, .., r) each repeated r/K times, (b, 1.., r), or (b, K) if B is multiplied."""
        condition, gate, scale = self.running, self.gate_of(layer, adapter), layer.scaling[adapter]
        factor_of = partial(self._factor_of, layer, layer.lora_B[adapter], middle, scale)
        if torch.compiler.is_compiling() or condition is None or condition.factors is None:
            return factor_of(self.weights_of(layer, adapter))
        key = adapter, scale, middle.shape, middle.dtype, middle.device, torch.is_grad_enabled()
        slices, gates = condition.factors.setdefault(key, {}), self.layer_gates[adapter]  # of one tensor: fewer kernels
        if gates and not slices and adapter in condition.weights:
            slices |= zip(gates, ([part] for part in factor_of(condition.weights[adapter]).unbind()), strict=True)
        if not slices.get(gate):
            factor = factor_of(self.weights_of(layer, adapter))
            slices[gate] = list(factor.expand(len(self.merged) if adapter in self.gates else 1, *factor.shape).unbind())
        return slices[gate].pop()

    def _factor_of(self, layer: LoraLayer, B: nn.Module, middle: Tensor, scale: float, w: Tensor) -> Tensor:
        """w (.., b, K) -> (.., b, 1.., r); (b, K) if compiled, for b sequences and B in place.  Raises UserError."""
        K, (rows, *between, rank) = w.shape[-1], middle.shape
        if rows != w.shape[-2] or middle.dim() < self.least_dim:
            problem = f"{w.shape[-2]} rows but an adapted layer got {(rows, *between, layer.in_features)}"
            remedy = "pass one per row (adapter_names and loose tokens, as in OPT's fc1, fail)"
            raise UserError(f"sequence_embeds has {problem}: {remedy}.")
        if torch.compiler.is_compiling() and between and type(B) is nn.Linear and not B.weight.is_meta:
            return K * scale * w.to(middle.device)
        factor = (K * scale * w).repeat_interleave(rank // K, dim=-1, output_size=rank).to(middle)
        return factor.view(*w.shape[:-1], *(1 for _ in between), rank)


def current_task() -> asyncio.Task | None:
    with suppress(RuntimeError):  # no event loop runs
        return asyncio.current_task()


@dataclass(eq=False)
class CarryingCheckpoint:
    """A gradient-checkpointing function whose block runs again, perhaps in another thread, under the same z and w."""

    conditioning: Conditioning
    checkpoint: Callable

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if (outer := self.conditioning.running) is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)

        def run(z: Tensor, *rest: Any, **options: Any) -> Any:
            weights = dict(zip(outer.weights, rest, strict=False))
            slices = dict(zip(outer.slices, rest[len(weights) :], strict=False))
            with self.conditioning.under(Condition(z, weights, slices)):
                return function(*rest[len(weights) + len(slices) :], **options)

        # z and w enter as arguments, so that the gate neither runs again nor gets its gradient more than once
        return self.checkpoint(run, outer.z, *outer.weights.values(), *outer.slices.values(), *args, **kwargs)
