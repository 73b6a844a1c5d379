import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig

from ilora import data
from ilora.data import Questions, make_world
from ilora.data.world import titles
from ilora.errors import UserError
from ilora.evaluation import compute_metrics, evaluate
from ilora.language import LanguageRecommender, Projector, Prompts, base_models, load_language_model, wording
from ilora.language.pretraining import EMBEDDED


@pytest.fixture(scope="module")
def base():
    return load_language_model("embedded", device="cpu")


# ---------------------------------------------------------------- the embedded base


def test_the_embedded_base_is_small_and_plain():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 10e6
    assert {file.suffix for file in EMBEDDED.iterdir()} <= {".json", ".safetensors", ".md"}
    for file in EMBEDDED.glob("*.json"):
        text = file.read_text("utf-8")
        assert "auto_map" not in text  # no code to load; tests/test_project.py looks for machines' folders
        json.loads(text)


def test_the_embedded_base_loads_frozen_and_in_eval_mode(base):
    model, tokenizer = base
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).dtype == torch.float32  # on the CPU
    assert len(tokenizer) <= 4096 == model.get_input_embeddings().num_embeddings
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<item>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_text_makes_the_round_trip_through_tokens(base):
    _, tokenizer = base
    texts = [*titles()["title"], *wording("story", "read"), "Amélie — 七人の侍", "  two  spaces\n", "Se7en (1995)"]
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == text
    for title in titles()["title"]:
        assert len(tokenizer(f" {title}", add_special_tokens=False).input_ids) <= 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILORA_HOME", str(tmp_path_factory.mktemp("home")))
        yield data.load("world", users=400, conflict=0.5, seed=0)


@pytest.mark.parametrize("behaviour", [False, True], ids=["text-only", "placeholders"])
def test_before_any_adapter_it_names_an_offered_title_but_not_the_right_one(base, world, behaviour, monkeypatch):
    """The paper's Llama2 row in miniature: at least 90% valid predictions, right little more often than by chance."""
    model, tokenizer = base
    prompts = Prompts(tokenizer, list(world.items["title"]), world.noun, world.verb)
    test = data.sequences(world, "test")
    chosen = np.sort(np.random.default_rng(0).choice(len(test), 120, replace=False))
    if behaviour:
        plain = prompts.batch
        monkeypatch.setattr(prompts, "batch", lambda *args: plain(*args[:3], True))
    recommender = LanguageRecommender(model, prompts)
    report = compute_metrics(evaluate(recommender, Questions(test.take(chosen), len(world.items), seed=0)))
    assert report["valid_ratio"]["value"] >= 0.9
    assert report["hit_ratio"]["value"] < 0.12


def test_it_knows_what_everybody_reads_next(base):
    """Of two stories after a history, the first follower is likelier than a story drawn at random."""
    model, tokenizer = base
    world = make_world(users=60, conflict=0.0, seed=9)
    prompts = Prompts(tokenizer, list(world.items["title"]), "story", "read")
    rng, better = np.random.default_rng(0), []
    for user in range(60):
        items = world.events["item"].to_numpy()[20 * user : 20 * user + 8]
        unread = np.setdiff1d(np.arange(len(world.items)), items)
        pair = world.followers[0, items[-1], 0], rng.choice(unread)
        if pair[0] in items:
            continue
        scores = []
        for item in pair:
            listed = prompts.join([*items, item], hybrid=False)
            tokens, answer = prompts.opening + listed, prompts.answers[item]
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            places = range(len(tokens) - len(answer) - 1, len(tokens) - 1)
            scores.append(sum(logits[place, tokens[place + 1]] for place in places))
        better.append(bool(scores[0] > scores[1]))
    assert len(better) > 40 and np.mean(better) > 0.8


def test_the_embedded_base_serves_the_world_and_other_data_get_their_own(base, world, monkeypatch):
    monkeypatch.setattr(base_models, "base_for", lambda dataset, **_: pytest.fail("made a base for the world"))
    model, _ = load_language_model("embedded", world, device="cpu")
    assert torch.equal(model.lm_head.weight, base[0].lm_head.weight)
    made_for = []
    monkeypatch.setattr(base_models, "base_for", lambda dataset, **_: made_for.append(dataset.name) or EMBEDDED)
    load_language_model("embedded", replace(world, name="other"), device="cpu")
    assert made_for == ["other"]


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize("name", ["llama", "no/such/folder/here", ""])
def test_a_base_model_that_is_no_name_and_no_folder_is_refused(name):
    with pytest.raises(UserError, match="is no folder and no name owner/model"):
        load_language_model(name, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="base_model"):
        load_language_model(str(tmp_path), device="cpu")


def test_a_masked_language_model_is_refused_before_its_weights_are_read(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"could not be loaded \(.* masked one, as BERT is\): name a causal"):
        load_language_model(str(tmp_path), device="cpu")


def test_a_folder_with_pickled_weights_alone_is_refused(base, tmp_path):
    model, tokenizer = base
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_language_model(str(tmp_path), device="cpu")


# ---------------------------------------------------------------- projector


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_projector_starts_near_the_placeholder_whatever_the_scale(scale):
    torch.manual_seed(0)
    embeddings, placeholder = scale * torch.randn(50, 64), torch.randn(128)
    projector = Projector(embeddings, placeholder)
    projected = projector(embeddings)
    assert projected.shape == (50, 128)
    distance = (projected - placeholder).norm(dim=1) / placeholder.norm()
    assert 0.01 < distance.mean() < 0.6  # near, but each item is different
    assert torch.pdist(projected).min() > 1e-3
