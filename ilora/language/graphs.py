"""A small decoder in training as CUDA graphs: one launch for each pass, where Python would launch thousands of them."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from operator import attrgetter
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import MoeModelOutputWithPast

from ilora.adapter.conditioning import Condition

log = logging.getLogger(__name__)
CAUSAL = {"is_tracing": lambda *_: False, "find_packed_sequence_indices": lambda _: None}  # rows need no mask
ADAPTERS = attrgetter("active_adapters", "disable_adapters", "merged")


def record_passes(model: PeftModel) -> Callable[[], None]:
    """Record the decoder's first training batch of each shape and replay it for later ones; returns what ends this."""
    decoder, conditioning = model.get_base_model().get_decoder(), getattr(model.base_model, "conditioning", None)
    recorded, pool, plain = {}, torch.cuda.graph_pool_handle(), decoder.forward  # graphs run in turn and share memory
    layer = next(part for part in model.modules() if isinstance(part, BaseTunerLayer))  # as all others are
    adapters, undo, waiting = ADAPTERS(layer), ExitStack(), WeakSet()  # waiting: a pass before its gradients
    for parameter in filter(lambda parameter: parameter.requires_grad, decoder.parameters()):
        undo.callback(parameter.register_hook(torch.clone).remove)  # a replay writes its gradients where the last did

    def forward(*args: Any, inputs_embeds: Tensor | None = None, **inputs: Any) -> Any:
        masked = args or inputs_embeds is None or any(isinstance(value, Tensor | dict) for value in inputs.values())
        if masked or waiting or not (decoder.training and torch.is_grad_enabled() and ADAPTERS(layer) == adapters):
            return plain(*args, inputs_embeds=inputs_embeds, **inputs)
        condition = None if conditioning is None else conditioning.running
        given = (inputs_embeds,) if condition is None else (inputs_embeds, condition.z, *condition.weights.values())
        key = tuple((value.shape, value.dtype, value.requires_grad) for value in given)
        if key not in recorded:

            def run(embeds: Tensor, z: Tensor | None = None, *weights: Tensor) -> Tensor:
                if z is None:
                    return plain(inputs_embeds=embeds, **inputs)[0]
                with conditioning.under(Condition(z, dict(zip(conditioning.running.weights, weights, strict=True)))):
                    return plain(inputs_embeds=embeds, **inputs)[0]

            whole = nn.ModuleList([decoder])  # whose parameters are inputs of the recorded function, too
            whole.forward = run
            sample = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in given)
            autocast = torch.autocast("cuda", torch.bfloat16, torch.is_autocast_enabled("cuda"), cache_enabled=False)
            devices = [inputs_embeds.device] * inputs_embeds.is_cuda  # where recording must not change dropout
            try:
                with torch.random.fork_rng(devices), autocast, mock.patch.multiple(masking_utils, **CAUSAL):
                    recorded[key] = torch.cuda.make_graphed_callables(whole, sample, allow_unused_input=True, pool=pool)
            except RuntimeError as error:  # such as a layer that waits for the GPU
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.warning("each kernel is launched by itself, which is slower: %s", str(error).splitlines()[0])
                decoder.forward = plain
            if key not in recorded:  # not above, where the error keeps what was tried in memory
                return plain(inputs_embeds=inputs_embeds, **inputs)
        output = recorded[key](*given)
        output.register_hook(begun := lambda _: waiting.clear())  # lives as long as the pass can have gradients
        waiting.add(begun)
        return MoeModelOutputWithPast(output)

    undo.callback(setattr, decoder, "forward", plain)
    decoder.forward = forward
    return undo.close
