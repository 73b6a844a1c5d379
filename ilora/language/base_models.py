"""Base models: any causal language model of Hugging Face, SmolLM2, or `embedded`, the small Llama of this package."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import BitsAndBytesConfig

from ilora import artifacts, devices
from ilora.data.dataset import Dataset
from ilora.errors import UserError
from ilora.language import smollm2
from ilora.language.pretraining import EMBEDDED, base_for
from ilora.language.prompts import Prompts, first_line

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_use_double_quant": True}
QUANTIZATION = {"8bit": BitsAndBytesConfig(load_in_8bit=True), "4bit": BitsAndBytesConfig(load_in_4bit=True, **NF4)}


@devices.memory_for(rows=1)
def load_language_model(
    base_model: str = "embedded", dataset: Dataset | None = None, device: str = "auto", quantize: str = ""
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model, frozen and in eval mode, and its tokenizer.

    base_model: a name on the Hugging Face hub, a folder, "smollm2", or "embedded", which is first trained on the titles
        and training histories of a `dataset` other than the world, once.  Raises UserError if it cannot be loaded.
    quantize: "8bit" or "4bit" loads the linear layers so, by bitsandbytes.
    """
    if quantize and (quantize not in QUANTIZATION or not is_bitsandbytes_available()):
        raise UserError(f"quantize must be empty or, after `pip install bitsandbytes`, 8bit or 4bit, not {quantize!r}")
    folder = base_model
    if base_model == "embedded":
        folder = EMBEDDED if dataset is None or dataset.name == "world" else base_for(dataset, device=device)
    elif base_model == "smollm2":
        folder = smollm2.folder()
    elif base_model.count("/") != 1 and not (base_model and Path(base_model).is_dir()):
        raise UserError(f"base_model {base_model!r} is no folder and no name owner/model: correct the name")
    place, pinned = devices.pick_device(device), {"trust_remote_code": False} | artifacts.revision(folder)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options |= {"quantization_config": QUANTIZATION[quantize], "device_map": {"": place}} if quantize else {}
    try:
        config = AutoConfig.from_pretrained(folder, **pinned)
        if config.is_encoder_decoder or "MaskedLM" in str(config):
            raise ValueError("it is an encoder-decoder model, as T5 is, or a masked one, as BERT is")
        tokenizer = AutoTokenizer.from_pretrained(folder, **pinned)
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options, **pinned)
        if info["missing_keys"]:
            raise ValueError(f"it has no trained {min(info['missing_keys'])}")
    except Exception as error:  # transformers raises many kinds
        own_code = "it needs code from its repository, which is never run here"
        reason = own_code if "trust_remote_code" in str(error) else first_line(str(error)) or type(error).__name__
        remedy = "name a causal language model with safetensors weights, on the Hugging Face hub or in a folder"
        raise UserError(f"base_model {base_model!r} could not be loaded ({reason}): {remedy}") from error
    return (model if quantize else model.to(place)).eval().requires_grad_(False), tokenizer


def quantization(model: nn.Module) -> str:
    """How a model was loaded: "8bit", "4bit" or ""."""
    return next((kind for kind in QUANTIZATION if getattr(model, f"is_loaded_in_{kind}", False)), "")


def check_causal(model: nn.Module, prompts: Prompts) -> None:
    """Raise UserError unless the model predicts the next token of texts written by the tokenizer of `prompts`."""
    name, vocabulary = type(model).__name__, model.get_input_embeddings().weight.shape[0]
    if any(isinstance(part, BaseTunerLayer) for part in model.modules()):
        raise UserError(f"this {name} carries an adapter already: load the base model again, or call unload() first")
    last = max({prompts.end, *prompts.opening, *prompts.offer, *prompts.question}.union(*prompts.answers))
    if last >= vocabulary:
        raise UserError(f"the tokenizer writes token {last}, but {name} has {vocabulary}: load its own tokenizer")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: choose a causal language model")
    start = (prompts.opening + prompts.offer)[:3]
    logits = forward(model, [[*start, prompts.question[0]], [*start, prompts.end]])
    if logits is None or logits.shape[-1] < vocabulary:
        raise UserError(f"{name} has no language model head: load it with AutoModelForCausalLM")
    tolerance = 1e-4 if logits.dtype == torch.float32 and not quantization(model) else 5e-2
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=tolerance, atol=tolerance):
        raise UserError(f"{name} is not causal, its predictions depend on later tokens: choose a causal language model")


@torch.no_grad()
def forward(model: nn.Module, tokens: list[list[int]]) -> Tensor | None:
    """A model's logits, if it has any, for token ids (batch, tokens), in eval mode, which it stays in."""
    embedding = model.get_input_embeddings()
    embeds = embedding(torch.tensor(tokens, device=embedding.weight.device))
    return getattr(model.eval()(inputs_embeds=embeds, use_cache=False), "logits", None)


def greedy(model: nn.Module, end: int) -> AbstractContextManager:
    """In this context, `generate` writes the most likely tokens, up to `end` or another token that ends texts."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {end, *(known if isinstance(known, list) else [known])} - {None}
    config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=end, do_sample=False)
    return mock.patch.object(model, "generation_config", config)


class Projector(nn.Module):
    """Recommender's item embedding (..., dim) -> token embedding (..., hidden), at the start near the placeholder's."""

    def __init__(self, embeddings: Tensor, placeholder: Tensor):
        super().__init__()
        dim, hidden = embeddings.shape[1], len(placeholder)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        with torch.no_grad():
            self.layers[0].weight.div_(embeddings.std())  # whatever the scale of a recommender
            self.layers[-1].weight.mul_(placeholder.float().std())
            self.layers[-1].bias.copy_(placeholder)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)
