"""The way of the representations z from the caller to the adapted layers.

model(ids, sequence_embeds=z)        with model.sequence_embeds(z): model(ids)
           |                                       |
           +-- pre-hook of the base model ---------+
                             |
                             v
      Condition: z (b, d), w (b, K) of each shared gate        one for each thread
            |                                |
            v                                v
  Conditioning.factor in each      CarryingCheckpoint hands z and w to the
  adapted layer                    recomputation of a checkpointed block
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ilora.adapter.gates import Gate, check_representations
from ilora.errors import UserError


@dataclass(eq=False)
class Condition:
    """What running code is conditioned on."""

    z: Tensor  # (b, d)
    weights: dict[str, Tensor]  # adapter -> w (b, K) of its shared gate, once computed
    task: asyncio.Task | None = None  # of a context: the asyncio task that entered it
    outer: "Condition | None" = None  # of a forward: the context around it
    factors: dict[tuple, list[Tensor]] | None = None  # of a forward: those not handed out yet, see `factor`


@dataclass(eq=False)
class _Running:
    """What a thread runs under."""

    condition: Condition | None = None


class _PerThread(threading.local):
    """An object per thread (compiled code reads no context variable and loses what it sets on a thread's local)."""

    def __init__(self) -> None:
        self.running = _Running()

    def __reduce__(self) -> tuple:
        return _PerThread, ()  # a copied or pickled model starts without a condition


def _task() -> asyncio.Task | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return None


class Conditioning:
    """What conditions the adapted layers of one base model; all wrappers of the base share it.

    The base model (by its hooks) and the adapted layers refer to it, and it refers to neither, so that a dropped
    model is freed at once.
    """

    def __init__(self, model: nn.Module, least_dim: int) -> None:
        self.gates = nn.ModuleDict()  # adapter -> its gate, where all layers share one
        self.active: list[str] = []  # the active adapters
        self.merged: list[list[str]] = []  # each adapted layer's list of merged adapters, which PEFT keeps
        self.least_dim = least_dim  # of what a layer may get: 3 for (b, s, d_in), 2 for (b, d_in)
        self._per_thread = _PerThread()
        checkpointed = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_pre_hook(partial(_carry_through_checkpoints, self, checkpointed)),
            model.register_forward_hook(self._after_forward, always_call=True),
        )

    def disconnect(self, model: nn.Module) -> None:
        """Leave the base model as it was."""
        for hook in self._hooks:
            hook.remove()
        for part in model.modules():
            function = part.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, CarryingCheckpoint):
                part._gradient_checkpointing_func = function.checkpoint

    # ---- from the caller

    @property
    def running(self) -> _Running:
        return self._per_thread.running

    @contextmanager
    def under(self, condition: Condition) -> Iterator[None]:
        before, self.running.condition = self.running.condition, condition
        try:
            yield
        finally:
            self.running.condition = before

    @contextmanager
    def context(self, z: Tensor) -> Iterator[None]:
        """What `model.sequence_embeds(z)` enters."""
        check_representations(z)
        with self.under(Condition(self.given_or_enclosing(z), {}, task=_task())):
            yield

    def _enclosing(self) -> Condition | None:
        """The context around a starting call; the condition of a forward is left from an interrupted one."""
        condition = self.running.condition
        if condition is not None and condition.factors is not None:
            condition = condition.outer
        if condition is not None and not torch.compiler.is_compiling() and condition.task is not _task():
            raise UserError(
                "another asyncio task is inside `with model.sequence_embeds(z):` in this thread: "
                "pass sequence_embeds=z to the call, or do not await inside the context."
            )
        return condition

    def given_or_enclosing(self, z: Tensor | None) -> Tensor | None:
        """The z of a starting call.  Raises UserError if the model is merged: it is one user's then."""
        outer = self._enclosing()
        z = outer.z if z is None and outer is not None else z
        if z is not None and any(self.merged):
            raise UserError(
                "the adapter is merged for one user, whom alone the model serves: "
                "call model.unmerge_adapter() before you pass sequence_embeds or enter its context."
            )
        return z

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Take `sequence_embeds` out of the base model's keywords and apply the shared gates to it."""
        z, condition = self.given_or_enclosing(kwargs.pop("sequence_embeds", None)), None
        if z is not None:
            weights = {name: self.gates[name](z) for name in self.active if name in self.gates}
            condition = Condition(z, weights, outer=self._enclosing(), factors={})
        self.running.condition = condition
        return args, kwargs

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.running.condition = self._enclosing()

    # ---- to the layers

    def gate_of(self, layer: LoraLayer, adapter: str) -> Gate:
        return self.gates[adapter] if adapter in self.gates else layer.lora_gate[adapter]

    def weights_of(self, layer: LoraLayer, adapter: str) -> Tensor:
        """w (b, K) of an adapted layer in the running forward."""
        if (condition := self.running.condition) is None:
            raise UserError(
                "iLoRA got no sequence representations: pass sequence_embeds=z of shape (batch, gate_dim) or "
                "call inside `with model.sequence_embeds(z):` (and give transformers.Trainer "
                "remove_unused_columns=False, or it drops the column)."
            )
        if adapter in condition.weights:
            return condition.weights[adapter]
        return self.gate_of(layer, adapter)(condition.z)  # the layer's gate, or a call below the whole model

    def weights_of_one_user(self, layer: LoraLayer, adapter: str) -> Tensor:
        """w (1, K) of the only row that the context has."""
        if (condition := self.running.condition) is None or len(condition.z) != 1:
            raise UserError(
                "merging is for exactly one user: give z of shape (1, gate_dim), such as a group's mean, and "
                "merge inside `with model.sequence_embeds(z):`."
            )
        check_representations(condition.z, finite=True)
        return self.gate_of(layer, adapter)(condition.z).detach()

    def factor(self, layer: LoraLayer, adapter: str, middle: Tensor) -> Tensor:
        """What the middle (b, .., r) of a layer is multiplied by: K alpha/r w, each repeated r/K times, (b, 1.., r).

        Layers under a shared gate get slices of one tensor, whose gradients are summed at once: on a GPU each
        small kernel more costs eager code a launch in every layer.
        """
        condition = None if torch.compiler.is_compiling() else self.running.condition
        if condition is None or condition.factors is None or adapter not in condition.weights:
            return self._new_factor(layer, adapter, middle)
        like = middle.shape, middle.dtype, middle.device, torch.is_grad_enabled()
        left = condition.factors.setdefault((adapter, layer.scaling[adapter], *like), [])
        if not left:
            factor = self._new_factor(layer, adapter, middle)
            left += factor.expand(len(self.merged), *factor.shape).unbind()
        return left.pop()

    def _new_factor(self, layer: LoraLayer, adapter: str, middle: Tensor) -> Tensor:
        w, shape = self.weights_of(layer, adapter), middle.shape
        if shape[0] != w.shape[0] or len(shape) < self.least_dim:
            raise UserError(
                f"sequence_embeds has {w.shape[0]} rows but an adapted layer got {(*shape[:-1], layer.in_features)}: "
                "pass one representation per row of the batch (a layer that sees loose tokens, such as OPT's fc1 or a "
                "routed expert, cannot be adapted)."
            )
        K, rank = w.shape[1], shape[-1]
        factor = (K * layer.scaling[adapter] * w).repeat_interleave(rank // K, dim=1, output_size=rank).to(middle)
        return factor.view(len(factor), *(1,) * (len(shape) - 2), rank)


class CarryingCheckpoint:
    """A checkpoint function that takes along the z and w of *its* forward.

    The recomputation runs in the backward pass, when that forward is gone, perhaps in another thread. z and w
    enter as arguments, so that the gate is neither recomputed nor run backward more than once.
    """

    def __init__(self, conditioning: Conditioning, checkpoint: Callable) -> None:
        self.conditioning, self.checkpoint = conditioning, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        condition = self.conditioning.running.condition
        if condition is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        adapters = tuple(condition.weights)

        def run(z: Tensor, *rest: Any, **options: Any) -> Any:
            weights = dict(zip(adapters, rest, strict=False))
            with self.conditioning.under(Condition(z, weights)):
                return function(*rest[len(adapters) :], **options)

        return self.checkpoint(run, condition.z, *condition.weights.values(), *args, **kwargs)


def _carry_through_checkpoints(
    conditioning: Conditioning, checkpointed: list[nn.Module], model: nn.Module, args: tuple
) -> None:
    """Wrap the checkpoint functions that the base model's parts have been given since the last forward."""
    if torch.compiler.is_compiling():
        return
    for part in checkpointed:
        function = part.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, CarryingCheckpoint):
            part._gradient_checkpointing_func = CarryingCheckpoint(conditioning, function)
