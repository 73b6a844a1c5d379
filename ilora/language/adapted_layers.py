"""Which layers of a language model get the adapter."""

import copy
import logging
from collections.abc import Iterable

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ilora.adapter.config import ILoraConfig
from ilora.errors import UserError
from ilora.language.base_models import forward

log = logging.getLogger(__name__)
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # PEFT adapts no out_proj in these


def adapter_config(
    rank: int = 8, alpha: float = 32, dropout: float = 0.1, experts: int = 1,
    target_modules: str | list[str] = "all-linear", **gate: int | str | bool,
) -> LoraConfig:  # fmt: skip
    """The paper's adapter: LoRA for one expert, else iLoRA; by default on all linear layers but the output layer."""
    shape = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": target_modules}
    if experts == 1:
        return LoraConfig(task_type="CAUSAL_LM", **shape)
    return ILoraConfig(num_experts=experts, **shape, **gate)


def adapted(model: nn.Module, adapter: LoraConfig) -> PeftModel:
    """The model with an adapter on its `target_modules`; "all-linear": on all linear layers that can have one.

    Left out are the output layer; layers that get a list of tokens instead of (batch, tokens, dim), or that the model
    does not call, as iLoRA cannot know their rows; stacked experts; and Mamba's out_proj, which PEFT excludes. The log
    names the layers. Raises UserError if `target_modules` names one that is left out, or nothing.
    """
    name = type(model).__name__
    if model.config.model_type == "mpt":
        raise UserError(f"PEFT passes no embeddings to {name}: choose another base model")
    fits, others = _linear_layers(model)
    wanted, adapter = adapter.target_modules, copy.deepcopy(adapter)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        ambiguous = _last_names(fits) & _last_names(others)
        adapter.target_modules = list(fits) if ambiguous else sorted(_last_names(fits))
    chosen = {layer for layer in (*fits, *others) if check_target_module_exists(adapter, layer)}
    if not chosen or chosen - fits.keys():
        raise UserError(
            f"target_modules={wanted!r} means {_listed(chosen - fits.keys()) or 'nothing'} in {name}, which no adapter "
            f"can be put on: choose among {_listed(fits) or 'the layers of another base model'}"
        )
    adapter.fan_in_fan_out = any(isinstance(fits[layer], Conv1D) for layer in chosen)
    try:
        wrapped = get_peft_model(model, adapter)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT cannot put the adapter on {name}: {error}") from error
    left = (fits.keys() | others) - chosen
    note = f"the adapter is on {_listed(chosen)} of {name}" + (f"; not on {_listed(left)}" if left else "")
    log.log(logging.WARNING if left else logging.INFO, note)
    return wrapped


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """The layers that can have an adapter, by name, and the names of other weights that work like a linear layer."""
    head, dims = model.get_output_embeddings(), {}
    modules = {name: module for name, module in model.named_modules() if module is not head}
    linear = {name: module for name, module in modules.items() if _is_linear(module)}
    hooks = [module.register_forward_pre_hook(lambda _, inputs, name=name: dims.update({name: inputs[0].dim()}))
             for name, module in linear.items()]  # fmt: skip
    forward(model, [[0, 1, 2], [2, 1, 0]])
    for hook in hooks:
        hook.remove()
    mamba = model.config.model_type in MAMBA
    fits = {name: module for name, module in linear.items()
            if dims.get(name) == 3 and not (mamba and name.endswith("out_proj"))}  # fmt: skip
    others = linear.keys() - fits.keys()
    for name, module in modules.items():
        if name not in linear and not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            for key, value in module.named_parameters(recurse=False):
                if value.dim() == 3 or (value.dim() == 2 and key == "weight"):
                    others.add(name if key == "weight" else f"{name}.{key}")
    return fits, others


def _is_linear(module: nn.Module) -> bool:
    """Also a quantised one, which may derive from nn.Linear or only be called so."""
    return isinstance(module, nn.Linear | Conv1D) or ("Linear" in type(module).__name__ and not list(module.children()))


def _last_names(layers: Iterable[str]) -> set[str]:
    return {layer.rpartition(".")[2] for layer in layers}


def _listed(layers: Iterable[str]) -> str:
    return ", ".join(sorted(_last_names(layers)))
