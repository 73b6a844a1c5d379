"""Language models: any Hugging Face causal LM, or `embedded`, the small Llama that the package brings, grown or not."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.errors import UserError
from ilora.language import smollm2
from ilora.language.pretraining import EMBEDDED, RECIPES, base_for
from ilora.language.prompts import Prompts

log = logging.getLogger(__name__)
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # PEFT adapts no out_proj in these


def load_language_model(
    base_model: str = "embedded", dataset: Dataset | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, frozen and in eval mode, and its tokenizer.

    base_model: a name on the Hugging Face hub, a folder, "smollm2", see smollm2.py, "embedded", or "embedded-large",
        which is grown from it; for a
        `dataset` other than the world the embedded model is first trained on the titles and the training users'
        histories, once, and kept; the large one for the world, too.
    """
    folder = base_model
    if base_model == "embedded" and (dataset is None or dataset.name == "world"):
        folder = EMBEDDED
    elif base_model in RECIPES:
        if dataset is None:
            raise UserError(f"base_model {base_model!r} is made for a data set: name the data set")
        folder = base_for(dataset, device=device, recipe=RECIPES[base_model])
    elif base_model == "smollm2":
        folder = smollm2.folder()
    elif not Path(base_model).is_dir() and base_model.count("/") != 1:
        raise UserError(f"base_model {base_model!r} is no folder and no name of the form owner/model")
    place = devices.pick_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    pinned = {"trust_remote_code": False} | artifacts.revision(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **pinned)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **pinned
        )
        if model.config.is_encoder_decoder:
            raise ValueError("it is an encoder-decoder model")
        if info["missing_keys"]:
            raise ValueError(f"it has no trained {min(info['missing_keys'])}")
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"base_model {base_model!r} could not be loaded ({_why(folder, error)}): name a causal language model of "
            "the Hugging Face hub, or a folder of one, with safetensors weights"
        ) from error
    return model.to(place).eval().requires_grad_(False), tokenizer


def _why(folder: str | Path, error: Exception) -> str:
    """The reason, in a user's words, for which transformers could not load a model."""
    with suppress(Exception):
        if AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder:
            return "it is an encoder-decoder model"
    if "trust_remote_code" in str(error):
        return "it needs code from its repository, which is never run here"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def position_limit(config: PretrainedConfig) -> int | None:
    """The most tokens that a model with this configuration can read; None if it has no limit."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
    limits = [getattr(config.get_text_config(), name, None) for name in names]
    return min((limit for limit in limits if limit), default=None)


def check_causal(model: nn.Module, prompts: Prompts) -> None:
    """Raise UserError for a model that does not predict the next token of what the tokenizer of `prompts` writes."""
    name, rows = type(model).__name__, model.get_input_embeddings().weight.shape[0]
    if any(isinstance(part, BaseTunerLayer) for part in model.modules()):
        raise UserError(f"this {name} carries an adapter already: load the base model again, or call unload() first")
    used = {prompts.end, *prompts.opening, *prompts.offer, *prompts.question}.union(*prompts.answers)
    if max(used) >= rows:
        raise UserError(
            f"the tokenizer writes token {max(used)} ({prompts.tokenizer.convert_ids_to_tokens(max(used))!r}) but "
            f"{name} has {rows} tokens: load the tokenizer that belongs to the model, or resize its token embeddings"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: choose a causal language model")
    start = (prompts.opening + prompts.offer)[:3]
    logits = getattr(_forward(model, [[*start, token] for token in (prompts.question[0], prompts.end)]), "logits", None)
    if logits is None or logits.shape[-1] < rows:
        raise UserError(f"{name} has no language model head: load it with AutoModelForCausalLM")
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=tolerance, atol=tolerance):
        raise UserError(f"{name} is not causal, its predictions depend on later tokens: choose a causal language model")


@torch.no_grad()
def _forward(model: nn.Module, tokens: list[list[int]]) -> ModelOutput:
    """A model's output for token ids, in eval mode."""
    training = model.training
    embedding = model.get_input_embeddings()
    embeds = embedding(torch.tensor(tokens, device=embedding.weight.device))
    output = model.eval()(inputs_embeds=embeds, use_cache=False)
    model.train(training)
    return output


@contextmanager
def greedy(model: nn.Module, end: int) -> Iterator[None]:
    """Inside this context `generate` writes the likeliest tokens, whatever the model's generation_config says.

    A row ends with `end`, a token id, or with one that ends it for the model.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    before = model.generation_config
    ends = before.eos_token_id if before else None
    ends = {end, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=end, do_sample=False)
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def only_at(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside this context the output layer computes the logits of each row's places (batch, n), and of no others."""

    def take(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].take_along_dim(places[..., None], dim=1),)  # (batch, tokens, hidden) -> (batch, n, hidden)

    hook = head.register_forward_pre_hook(take)
    try:
        yield
    finally:
        hook.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that the model runs one after the other: its list of modules with most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=nn.ModuleList())


# ---------------------------------------------------------------- the adapter
def adapted(model: nn.Module, adapter: LoraConfig) -> PeftModel:
    """The model with an adapter on its `target_modules`; "all-linear": all linear layers that it can be put on.

    The log says which. Left out are the output layer; layers that get loose tokens instead of (batch, tokens, dim), or
    that the model does not call as layers, because iLoRA then does not know a token's row; stacked experts; and
    Mamba's out_proj, which PEFT excludes. Raises UserError if nothing is left, or if `target_modules` names one.
    """
    if model.config.model_type == "mpt":
        raise UserError(f"PEFT passes no embeddings to {type(model).__name__}: choose another base model")
    fits, others = _linear_layers(model)
    names, adapter = adapter.target_modules, copy.deepcopy(adapter)
    everything = isinstance(names, str) and names.lower() == "all-linear"
    adapter.target_modules = names if not everything else _by_last_name(fits, others)
    chosen = {name for name in (*fits, *others) if check_target_module_exists(adapter, name)}
    if not chosen or chosen - fits.keys():
        wrong = _last(chosen - fits.keys()) or "nothing"
        raise UserError(
            f"target_modules={names!r} means {wrong} in {type(model).__name__}, which no adapter can be put on: choose "
            f"among {_last(fits) or 'the layers of another base model'}"
        )
    adapter.fan_in_fan_out = any(isinstance(fits[name], Conv1D) for name in chosen)
    try:
        wrapped = get_peft_model(model, adapter)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT cannot put the adapter on {type(model).__name__}: {error}") from error
    left = (fits.keys() | set(others)) - chosen
    note = f"the adapter is on {_last(chosen)} of {type(model).__name__}" + (f"; not on {_last(left)}" if left else "")
    log.log(logging.WARNING if left else logging.INFO, note)
    return wrapped


def _linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Name -> layer of those that an adapter can be put on, and of other weights that work like a linear layer."""
    head, dims = model.get_output_embeddings(), {}
    linear = {name: module for name, module in model.named_modules() if _is_linear(module) and module is not head}
    hooks = [module.register_forward_pre_hook(lambda _, inputs, name=name: dims.update({name: inputs[0].dim()}))
             for name, module in linear.items()]  # fmt: skip
    _forward(model, [[0, 1, 2], [2, 1, 0]])
    for hook in hooks:
        hook.remove()
    mamba = model.config.model_type in MAMBA
    fits = {name: module for name, module in linear.items()
            if dims.get(name) == 3 and not (mamba and name.endswith("out_proj"))}  # fmt: skip
    known = (nn.Embedding, nn.modules.conv._ConvNd)
    others = {name: module for name, module in linear.items() if name not in fits}
    for name, module in model.named_modules():
        if name not in linear and not isinstance(module, known) and module is not head:
            weights = [key for key, value in module.named_parameters(recurse=False)
                       if value.dim() == 3 or (value.dim() == 2 and key == "weight")]  # fmt: skip
            others |= {name if key == "weight" else f"{name}.{key}": module for key in weights}
    return fits, others


def _is_linear(module: nn.Module) -> bool:
    """Also a quantised one, which may derive from nn.Linear or only be called so."""
    return isinstance(module, nn.Linear | Conv1D) or ("Linear" in type(module).__name__ and not list(module.children()))


def _by_last_name(fits: Iterable[str], others: Iterable[str]) -> list[str]:
    """Target modules for PEFT that mean the layers in `fits` alone."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in fits))
    return list(fits) if set(last) & {name.rpartition(".")[2] for name in others} else last


def _last(names: Iterable[str]) -> str:
    """The last parts of module names, each once."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


class Projector(nn.Module):
    """Recommender's item embedding (..., dim) -> behaviour token (..., hidden): Linear, GELU, Linear.

    Starts near the placeholder's embedding (hidden,) for every item, so that the first hybrid prompt is close to
    the text-only one, and with inputs of unit variance, whatever the scale of the recommender's embeddings.
    """

    def __init__(self, embeddings: Tensor, placeholder: Tensor):
        super().__init__()
        dim, hidden = embeddings.shape[1], len(placeholder)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        with torch.no_grad():
            self.layers[0].weight.div_(embeddings.std())
            self.layers[-1].weight.mul_(placeholder.float().std())
            self.layers[-1].bias.copy_(placeholder)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)
