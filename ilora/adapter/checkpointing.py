"""Gradient checkpointing: a block that runs again in the backward pass needs the z and w of its forward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ilora.adapter.conditioning import Condition, Conditioning


class CarryingCheckpoint:
    """A checkpoint function that takes along the z and w of *its* forward.

    The block runs again when that forward has ended, perhaps in another thread. z and w enter as arguments, so that
    the gate neither runs again nor gets its gradient more than once.
    """

    def __init__(self, conditioning: Conditioning, checkpoint: Callable) -> None:
        self.conditioning, self.checkpoint = conditioning, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        condition = self.conditioning.running
        if condition is None or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        adapters = tuple(condition.weights)

        def run(z: Tensor, *rest: Any, **options: Any) -> Any:
            weights = dict(zip(adapters, rest, strict=False))
            with self.conditioning.under(Condition(z, weights)):
                return function(*rest[len(adapters) :], **options)

        return self.checkpoint(run, condition.z, *condition.weights.values(), *args, **kwargs)


def carry_through_checkpoints(model: nn.Module, conditioning: Conditioning) -> None:
    """Before each forward, wrap the checkpoint functions that the base model's parts have been given."""
    parts = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    conditioning.hooks.append(model.register_forward_pre_hook(partial(_wrap_checkpoints, conditioning, parts)))


def _wrap_checkpoints(conditioning: Conditioning, parts: list[nn.Module], model: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        return
    for part in parts:
        function = part.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, CarryingCheckpoint):
            part._gradient_checkpointing_func = CarryingCheckpoint(conditioning, function)


def disconnect(model: nn.Module, conditioning: Conditioning) -> None:
    """Leave the base model as it was before it was adapted."""
    for hook in conditioning.hooks:
        hook.remove()
    for part in model.modules():
        function = part.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, CarryingCheckpoint):
            part._gradient_checkpointing_func = function.checkpoint
