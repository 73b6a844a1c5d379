"""A tuned model is kept by its data, models and settings, and loads as it was trained."""

import gc
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch

from ilora import artifacts, data, evaluation, language
from ilora.errors import UserError
from ilora.language import AdapterSettings, LanguageRecommender, base_models, tuning, tuning_arguments
from ilora.language.pretraining import EMBEDDED
from ilora.recommenders import GRU4Rec, SASRec, fit_recommender


class Kept(Exception):
    """Carries the settings under which an adapter would be kept."""


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The settings under which an adapter would be kept, without tuning it."""
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    source = data.load("world", users=40)
    encoder = SASRec(len(source.items))

    def stop(kind, settings, *_, **__):
        raise Kept(settings)

    def settings_of(**settings):
        monkeypatch.setattr(artifacts, "cached", stop)
        with pytest.raises(Kept) as caught:
            language.tune(source, encoder, AdapterSettings(**settings), tuning_arguments(device="cpu"))
        return caught.value.args[0]

    return settings_of


def test_a_cpu_gets_few_rows_at_once():
    rows = [tuning_arguments(device="cpu", micro_batch_size=given).micro_batch_size for given in (0, 4, 32, None)]
    assert rows == [0, 4, 8, None]  # 0: what fits; None: the whole batch


def test_settings_of_a_gate_count_only_where_there_is_one(kept):
    gate = {"gate": "linear", "guidance": "sequence", "gate_per_layer": False, "gate_top_k": 0}
    adapter = {"rank", "alpha", "dropout", "experts"}
    names = kept(experts=4, **gate).keys()
    assert names & {*adapter, *gate} == {*adapter, "gate"}
    other = kept(experts=4, **gate | {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"})
    assert other.keys() - names == {"gate_per_layer", "gate_top_k", "guidance"}
    ignored = {"gate_per_layer": True, "gate_top_k": 2, "guidance": "random"}
    assert kept(experts=1, **ignored) == kept(experts=1)  # LoRA has no gate


def test_an_adapter_of_an_earlier_version_has_the_same_key(kept):
    """Adapters that took hours to train are loaded, not trained again."""
    settings = kept(experts=4, rank=8, alpha=32.0)
    assert artifacts.digest(settings) == "7fe7b258f907"
    settings = kept(target_modules=["q_proj"], alpha=32.0)
    assert artifacts.digest(settings) == "5111d48d7941"


def tuned(world, encoder, epochs=1, window=0, **adapter):
    """A small model and the history of its training."""
    arguments = tuning_arguments(epochs, batch_size=8, device="cpu")
    return language.tune(world, encoder, AdapterSettings(rank=4, **adapter), arguments, window=window, train_limit=16)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return data.load("world", users=60)


@pytest.mark.slow
def test_a_model_without_encoder_is_tuned_on_text_alone(world):
    model, history, snapshots = tuned(world, None, window=5)
    assert model.encoder is None and model.projector is None
    assert history["hit_ratio"].notna().sum() == 1
    questions = data.questions(world, "test", 5, limit=8)
    outcomes = evaluation.evaluate(model, questions)
    assert len(outcomes) == 8 and outcomes["rank"].between(1, 20).all()
    assert not (snapshots[0].parents[1] / "recommender" / "encoder").exists()
    assert tuned(world, None, window=6)[2] != snapshots


@pytest.mark.parametrize("adapter", [{"experts": 1}, {"experts": 2}, {"experts": 2, "gate": "clusters"}])
@pytest.mark.slow
def test_the_trained_model_is_the_reloaded_one_and_is_alone_in_memory(world, adapter):
    """A base model in memory twice is 13 GiB at 7B; nothing may wait for the garbage collector."""
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")

    def bases():
        tables = (part for part in gc.get_objects() if type(part) is torch.nn.Parameter)
        return sum(len(table) == 4096 for table in tables)  # rows of the embedded base's token embeddings

    gc.collect()
    before = bases()
    gc.disable()
    try:
        model, _, _ = tuned(world, encoder, **adapter, epochs=2)
        assert bases() == before + 1
        rows = [data.questions(world, "test", 6)[row] for row in range(6)]
        scores, written = model.score(rows), model.generate(rows)
        assert not model.training
        if "gate" in adapter:
            assert set(model.gate_weights(rows).flatten().tolist()) == {0.0, 1.0}
        del model
        again, _, _ = tuned(world, encoder, **adapter, epochs=2)
        assert bases() == before + 1
    finally:
        gc.enable()
    torch.testing.assert_close(again.score(rows), scores, rtol=0, atol=0)
    assert again.generate(rows) == written


@pytest.mark.parametrize("written", [[], ["step-00000001.safetensors", "step-00000002.safetensors"]])
def test_the_snapshots_are_those_that_were_written(written, world, monkeypatch):
    """There may be none, and a process that was killed leaves what it was writing."""

    def fit(model, train, arguments, work, **_):
        (work / "checkpoints").mkdir(parents=True)
        for name in written:
            (work / "snapshots" / f".{name}.abc").mkdir(parents=True)
            (work / "snapshots" / name).touch()
        return pd.DataFrame({"hit_ratio": [0.5]})

    monkeypatch.setattr(tuning, "fit", fit)
    arguments = tuning_arguments(device="cpu", snapshots=len(written))
    for _ in ("tuned", "loaded"):
        _, _, snapshots = language.tune(world, None, AdapterSettings(), arguments, window=5, train_limit=16)
        assert [path.name for path in snapshots] == written
    folder = artifacts.home().joinpath("adapters")
    assert not [*folder.rglob(".*"), *folder.rglob("checkpoints")]


def test_an_adapter_over_the_embedded_base_of_other_data_needs_that_data(world, monkeypatch, tmp_path):
    """Around the embedded base of the world it would answer, but wrongly."""
    base = shutil.copytree(EMBEDDED, tmp_path / "base" / "0123456789ab")
    monkeypatch.setattr(base_models, "base_for", lambda dataset, device: base)
    other, encoder = replace(world, name="csv"), SASRec(len(world.items))
    for experts in (1, 4):
        adapter = language.adapter_config(experts=experts)
        model = language.untuned(other, "embedded", encoder, device="cpu", adapter=adapter)
        model.save_pretrained(tmp_path / "kept", "embedded")
        LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu", dataset=other)
        for name in ("", "embedded"):
            with pytest.raises(UserError, match="trained on, 'embedded', for 'embedded' with dataset"):
                LanguageRecommender.from_pretrained(tmp_path / "kept", name, "cpu")


def test_a_prompt_longer_than_the_base_model_is_refused_before_training(world, monkeypatch):
    monkeypatch.setattr(tuning, "fit", lambda *_: pytest.fail("trained"))
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")

    def load_short(*arguments):
        model, tokenizer = language.load_language_model(*arguments)
        model.config.max_position_embeddings = 60
        return model, tokenizer

    monkeypatch.setattr(tuning, "load_language_model", load_short)
    with pytest.raises(UserError, match="tokens, but the base model reads 60"):
        tuned(world, encoder)
    with pytest.raises(UserError, match="tokens, but the base model reads 60"):
        evaluation.evaluate(language.untuned(world), data.questions(world, "test", limit=4))


def test_what_has_no_encoder_needs_a_window_and_no_gate(world):
    for wrong in ({}, {"window": 5, "experts": 4}):
        with pytest.raises(UserError, match="without an encoder give a window, and one expert"):
            tuned(world, None, **wrong)


def test_a_model_is_tuned_with_another_encoder_than_sasrec(world):
    trained, _ = fit_recommender(world, epochs=1, window=6, device="cpu", kind="GRU4Rec")
    for encoder in (trained, GRU4Rec(len(world.items), dim=32, window=6)):  # whatever the width of its states
        model, _, _ = tuned(world, encoder, experts=2)
        assert type(model.encoder) is GRU4Rec and model.gated
        questions = data.questions(world, "test", 6, limit=8)
        assert len(evaluation.evaluate(model, questions)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 4])
def test_checkpointed_layers_and_chosen_micro_batches_train_alike(world, tmp_path, monkeypatch, experts):
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")
    losses = []
    for number, more in enumerate(({}, {"gradient_checkpointing": True}, {"micro_batch_size": 0})):
        monkeypatch.setenv("ILORA_HOME", str(tmp_path / str(number)))
        arguments = tuning_arguments(batch_size=8, device="cpu", **more)
        settings = AdapterSettings(rank=4, experts=experts, dropout=0.1)
        model, history, _ = language.tune(world, encoder, settings, arguments, train_limit=32)
        assert getattr(model.language_model, "is_gradient_checkpointing", False) == (number == 1)
        losses.append(torch.tensor(history["loss"].to_numpy()))
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=0)
    assert model.batch_size == 8


def test_quantize_needs_bitsandbytes_and_a_known_word(world, monkeypatch):
    with pytest.raises(UserError, match=r"quantize must be empty or.*8bit or 4bit, not '2bit'"):
        language.untuned(world, quantize="2bit")
    monkeypatch.setattr("ilora.language.base_models.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        language.untuned(world, quantize="4bit")


@pytest.mark.slow
def test_quantised_bases(tmp_path):
    """The tests of quantised_bases.py pass in a process of their own, the only one that finds bitsandbytes."""
    folder = Path(sys.prefix) / "quantised"
    if not (folder / "bitsandbytes").is_dir() and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed, so no quantised base is tested: run `make test`")
    script = Path(__file__).with_name("quantised_bases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "temporary", script]
    path = os.pathsep.join([str(folder), str(script.parents[1])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and " 4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
