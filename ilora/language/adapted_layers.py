"""Which layers of a language model get the adapter."""

import copy
import logging

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.pytorch_utils import Conv1D

from ilora.adapter.config import ILoraConfig
from ilora.errors import UserError
from ilora.language.base_models import forward

log = logging.getLogger(__name__)


def adapter_config(
    rank: int = 8, alpha: float = 32, dropout: float = 0.1, experts: int = 1,
    target_modules: str | list[str] = "all-linear", **gate: int | str | bool,
) -> LoraConfig:  # fmt: skip
    """The paper's adapter: LoRA for one expert, else iLoRA; by default on all linear layers but the output layer."""
    own = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": target_modules}
    return LoraConfig(task_type="CAUSAL_LM", **own) if experts == 1 else ILoraConfig(num_experts=experts, **own, **gate)


def adapted(model: nn.Module, adapter: LoraConfig) -> PeftModel:
    """The model with an adapter on its `target_modules`; "all-linear": on all linear layers that can have one.

    Left out are the output layer, layers that are not called with (batch, tokens, dim), stacked experts, and Mamba's
    out_proj. The log names the layers. Raises UserError if `target_modules` names one that is left out, or nothing.
    """
    name, wanted, adapter = type(model).__name__, adapter.target_modules, copy.deepcopy(adapter)
    if model.config.model_type == "mpt":
        raise UserError(f"PEFT passes no embeddings to {name}: choose another base model")
    layers, first = _layers(model), {}  # first: module -> its first argument, if it has one
    with register_module_forward_pre_hook(lambda module, inputs: first.update({module: [*inputs, None][0]})):
        forward(model, [[0, 1, 2], [2, 1, 0]])
    called = {module for module, value in first.items() if getattr(value, "ndim", 0) == 3}
    fits = {layer for layer, module in layers.items() if module in called and _is_linear(module)}
    if model.config.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"):  # PEFT refuses them
        fits = {layer for layer in fits if not layer.endswith("out_proj")}
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        adapter.target_modules = fits
    listed = [] if isinstance(wanted, str) or wanted is None else wanted
    if unknown := [each for each in sorted(listed) if not any(f".{layer}".endswith(f".{each}") for layer in layers)]:
        raise UserError(f"{name} has no target module {unknown[0]!r}: choose among {_last_names(fits)}")
    chosen = {layer for layer in layers if check_target_module_exists(adapter, layer)}
    if not chosen or chosen - fits:
        problem = f"target_modules={wanted!r} means {_last_names(chosen - fits) or 'nothing'} in {name}"
        choice = _last_names(fits) or "the layers of another base model"
        raise UserError(f"{problem}, which no adapter can be put on: choose among {choice}")
    adapter.fan_in_fan_out = any(isinstance(layers[layer], Conv1D) for layer in chosen)
    try:
        wrapped = get_peft_model(model, adapter)
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT cannot put the adapter on {name}: {error}") from error
    left = layers.keys() - chosen
    note = f"the adapter is on {_last_names(chosen)} of {name}" + (f"; not on {_last_names(left)}" if left else "")
    log.log(logging.WARNING if left else logging.INFO, note)
    return wrapped


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that multiply by a matrix, except the output layer, by name; stacked experts by their parameters."""
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            if value.dim() == 3 or (value.dim() == 2 and key == "weight"):
                layers[name if key == "weight" else f"{name}.{key}"] = module
    head, others = model.get_output_embeddings(), (nn.Embedding, nn.modules.conv._ConvNd)
    return {name: module for name, module in layers.items() if module is not head and not isinstance(module, others)}


def _is_linear(module: nn.Module) -> bool:
    """Also a quantised layer, which may derive from nn.Linear or only be called so."""
    return isinstance(module, nn.Linear | Conv1D) or ("Linear" in type(module).__name__ and not list(module.children()))


def _last_names(layers: set[str]) -> str:
    return ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
