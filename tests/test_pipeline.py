"""What the steps of the notebooks make is found again by what it was made from."""

import gc

import pytest
import torch

from ilora import artifacts, data, evaluation, language
from ilora.errors import UserError
from ilora.language import tuning
from ilora.recommenders import GRU4Rec, SASRec, fit_recommender


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Parameters by which an adapter tuned with these settings is kept, without tuning it."""
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    source = data.load("world", users=40)
    encoder = SASRec(len(source.items))

    def parameters(**settings):
        kept = []
        monkeypatch.setattr(artifacts, "cached", lambda kind, settings, *_, **__: kept.append(settings) or tmp_path)
        language.tuned_folder(source, encoder, **settings)
        return kept[0]

    return parameters


def test_settings_of_a_gate_count_only_where_there_is_one(asked):
    gate = {"gate": "linear", "guidance": "sequence", "gate_per_layer": False, "gate_top_k": 0}
    adapter = {"rank", "alpha", "dropout", "experts"}
    names = asked(experts=4, **gate).keys()
    assert names & {*adapter, *gate} == {*adapter, "gate"}
    other = asked(experts=4, **gate | {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"})
    assert other.keys() - names == {"gate_per_layer", "gate_top_k", "guidance"}
    ignored = {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"}
    assert asked(experts=1, **ignored) == asked(experts=1)  # LoRA has no gate


SMALL = {"device": "cpu", "train_limit": 16, "batch_size": 8, "rank": 4}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return data.load("world", users=60)


def test_a_model_without_encoder_is_tuned_on_text_alone(world):
    model, history = language.tuned(world, None, window=5, **SMALL)
    assert model.encoder is None and model.projector is None
    assert history["hit_ratio"].notna().sum() == 1
    asked = data.questions(world, "test", 5, limit=8)
    outcomes = evaluation.evaluate(model, asked)
    assert len(outcomes) == 8 and outcomes["rank"].between(1, 20).all()
    folder = language.tuned_folder(world, None, window=5, **SMALL)
    assert not (folder / "recommender" / "encoder").exists()
    assert language.tuned_folder(world, None, window=6, **SMALL) != folder


@pytest.mark.parametrize("experts", [1, 2])
def test_the_trained_model_is_the_reloaded_one_and_is_alone_in_memory(world, experts):
    """A base model in memory twice is 13 GiB at 7B; nothing may wait for the garbage collector."""
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")

    def bases():
        tables = (part for part in gc.get_objects() if isinstance(part, torch.nn.Parameter))
        return sum(len(table) == 4096 for table in tables)  # rows of the embedded base's token embeddings

    gc.collect()
    before = bases()
    gc.disable()
    try:
        model, _ = language.tuned(world, encoder, experts=experts, epochs=2, **SMALL)
        assert bases() == before + 1
        rows = [data.questions(world, "test", 6)[row] for row in range(6)]
        ranked, written = model.rank(rows), model.generate(rows)
        assert not model.training
        del model
        again, _ = language.tuned(world, encoder, experts=experts, epochs=2, **SMALL)
        assert bases() == before + 1
    finally:
        gc.enable()
    torch.testing.assert_close(again.rank(rows), ranked, rtol=0, atol=0)
    assert again.generate(rows) == written


def test_a_prompt_longer_than_the_base_model_is_refused_before_training(world, monkeypatch):
    monkeypatch.setattr(tuning, "fit", lambda *_: pytest.fail("trained"))
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")
    monkeypatch.setattr("ilora.language.recommender.position_limit", lambda config: 60)
    with pytest.raises(UserError, match="tokens, but the base model reads 60"):
        language.tuned(world, encoder, **SMALL)
    with pytest.raises(UserError, match="tokens, but the base model reads 60"):
        evaluation.evaluate(language.untuned(world), data.questions(world, "test", limit=4))


def test_what_has_no_encoder_needs_a_window_and_no_gate(world):
    for wrong in ({}, {"window": 5, "experts": 4}):
        with pytest.raises(UserError, match="without an encoder give a window, and one expert"):
            language.tuned_folder(world, None, **wrong)


def test_a_model_is_tuned_with_another_encoder_than_sasrec(world):
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu", kind="GRU4Rec")
    model, _ = language.tuned(world, encoder, experts=2, **SMALL)
    assert type(model.encoder) is GRU4Rec and model.gated
    asked = data.questions(world, "test", 6, limit=8)
    assert len(evaluation.evaluate(model, asked)) == 8
