"""What is kept is loaded only by the same version, data, models and settings; each ingredient counts."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download

import ilora
from ilora import artifacts, data, language, recommenders
from ilora.errors import UserError
from ilora.language import load_language_model, pretraining
from ilora.language.pretraining import EMBEDDED, RECIPE
from ilora.recommenders import SASRec
from ilora.study import chat, commands, notebooks, parameters, table_runner

COMMITS = {"ada/small": "a" * 40, "ada/other": "b" * 40}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An artifacts folder, a hub that knows COMMITS, and a small embedded model in place of the shipped one."""
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretraining, "EMBEDDED", model(tmp_path / "embedded", b"shipped"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", on_hub)
    artifacts.hub_commit.cache_clear()
    yield tmp_path / "home"
    artifacts.hub_commit.cache_clear()


def on_hub(name, file):
    if name not in COMMITS:
        raise OSError("offline, and it is not in the cache")
    return str(Path("models", "snapshots", COMMITS[name], file))


def model(folder, weights=b"weights"):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    os.utime(folder / "model.safetensors", (0, 0))  # as if no tick of the clock lay between two versions
    (folder / "config.json").write_text("{}")
    return folder


def csv_files(folder, seed=0, users=40):
    """Data of a user: different for each seed, in files of one size."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    items = pd.DataFrame({"id": range(40), "title": [f"Title {n:02d}" for n in range(40)]})
    items.to_csv(folder / "items.csv", index=False)
    rows = [(user, item, 100 + at) for user in range(users) for at, item in enumerate(rng.permutation(40)[:8])]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(folder / "events.csv", index=False)
    return folder


def small_dataset(key="data-1"):
    source = data.load("world", users=40)
    return dataclasses.replace(source, key=key)


# ---------------------------------------------------------------- a key for everything that is kept


class Kept(Exception):
    """Carries the folder in which something would be kept."""


@pytest.fixture
def kept(monkeypatch):
    """Where `make(...)` would keep what it makes, without making it."""

    def place(kind, settings, inputs, make, note=""):
        raise Kept(f"{kind}/{artifacts.key(settings, inputs)}")

    def find(make, *arguments, **settings):
        monkeypatch.setattr(artifacts, "cached", place)
        try:
            return str(make(*arguments, **settings))
        except Kept as kept:
            return str(kept)

    return find


def make_world(**settings):
    return data.load("world", **({"users": 40} | settings))


def make_csv(folder):
    return data.load("csv", str(folder))


def recommender(key="data-1", dataset=None, **settings):
    return recommenders.fit_recommender(dataset or DATASET[key], **settings)


def adapter(key="data-1", encoder="one", **settings):
    places = {"base_model", "window", "train_limit", "quantize"} & settings.keys()
    rest = {name: settings.pop(name) for name in places}
    names = {field.name for field in dataclasses.fields(language.AdapterSettings)} & settings.keys()
    chosen = language.AdapterSettings(**{name: settings.pop(name) for name in names})
    return language.tune(DATASET[key], ENCODER[encoder], chosen, language.tuning_arguments(**settings), **rest)


def base(key="data-1", **settings):
    return pretraining.base_for(DATASET[key], **settings)


def cell(system="iLoRA", dataset="world", seed=0, draws=2, data_dir="", **settings):
    return table_runner.Cell(
        system, dataset, seed, draws, data_dir, table_runner.SETTINGS | {"users": 40} | settings
    ).result


def search(dataset="world", seed=0, **settings):
    return table_runner.Cell(
        "SASRec", dataset, seed, 2, "", table_runner.SETTINGS | {"users": 40} | settings
    ).search_result


def job(notebook="04", **given):
    (planned,) = notebooks.plan(given, [notebook])
    assert planned.executed.stem == planned.result.stem
    return planned.result


def saved(**given):
    """Where a notebook keeps its result."""
    values = {"dataset": "world", "users": 40, "seed": 0} | given
    return parameters.start("04_ilora", values).save({})


def replies(base_url="http://localhost/v1", model="small"):
    return chat.ChatRec(base_url, model, ["a", "b"], "item", "chose").folder


DATASET, ENCODER = {}, {}


@pytest.fixture(autouse=True)
def inputs(home):
    source = small_dataset()
    DATASET.update({key: dataclasses.replace(source, key=key) for key in ("data-1", "data-2")})
    ENCODER["one"] = SASRec(len(source.items), dim=8)
    ENCODER["other weights"] = SASRec(len(source.items), dim=8)
    ENCODER["other heads"] = SASRec(len(source.items), dim=8, heads=4)
    ENCODER["other heads"].load_state_dict(ENCODER["one"].state_dict())
    ENCODER["none"] = None


MADE = {
    "world": (make_world, {}),
    "recommender": (recommender, {}),
    "MoRec": (recommender, {"kind": "MoRec", "text_encoder": "ada/small"}),
    "base": (base, {}),
    "adapter": (adapter, {"experts": 4}),
    "adapter on text": (adapter, {"encoder": "none", "window": 10}),
    "cell": (cell, {}),
    "cell of MoRec": (cell, {"system": "MoRec", "text_encoder": "ada/small"}),
    "cell of ChatRec": (cell, {"system": "ChatRec", "chat_url": "http://localhost/v1", "chat_model": "a"}),
    "search": (search, {}),
    "notebook": (job, {"users": 40}),
    "result": (saved, {"experts": 4, "rank": 8}),
    "replies": (replies, {}),
}
CHANGES = {
    "world": {"conflict": 0.1, "users": 41, "seed": 1},
    "recommender": {
        "key": "data-2", "kind": "GRU4Rec", "seed": 1, "epochs": 2, "window": 5, "learning_rate": 2e-3,
        "batch_size": 64, "l2": 0.1, "dropout": 0.1,
    },
    "MoRec": {"key": "data-2", "text_encoder": "ada/other", "seed": 1},
    "base": {"key": "data-2", "seed": 1, "recipe": RECIPE | {"from_history": 0.5}},
    "adapter": {
        "key": "data-2", "encoder": "other weights", "base_model": "ada/small", "rank": 16, "alpha": 16, "dropout": 0.1,
        "experts": 2, "gate": "convolutional", "gate_per_layer": True, "gate_top_k": 2, "guidance": "random",
        "epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "train_limit": 20, "seed": 1, "window": 5,
        "quantize": "4bit",
    },
    "adapter on text": {"key": "data-2", "window": 5, "base_model": "ada/small"},
    "cell": {
        "system": "LLaRA", "seed": 1, "draws": 3, "conflict": 0.1, "users": 41, "repeats": "drop", "window": 5,
        "base_model": "ada/small",
        "rank": 16, "alpha": 16.0, "dropout": 0.1, "experts": 2, "epochs": 2, "learning_rate": 1e-3, "batch_size": 16,
        "train_limit": 10, "test_limit": 10, "quantize": "4bit",
    },
    "cell of MoRec": {"text_encoder": "ada/other"},
    "cell of ChatRec": {"chat_url": "http://localhost/v2", "chat_model": "b", "chat_limit": 5},
    "search": {"seed": 1, "conflict": 0.1, "users": 41, "window": 5},
    "notebook": {"notebook": "03", "conflict": 0.1, "users": 41, "seed": 1, "rank": 16, "base_model": "ada/small"},
    "result": {"users": 41, "seed": 1, "experts": 2, "base_model": "ada/small"},
    "replies": {"base_url": "http://localhost/v2", "model": "large"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, changes in CHANGES.items() for name in changes])
def test_each_setting_and_input_makes_another_key(kept, kind, name):
    make, settings = MADE[kind]
    first, again = kept(make, **settings), kept(make, **settings)
    assert first == again != kept(make, **settings | {name: CHANGES[kind][name]})


@pytest.mark.parametrize("change", [{"micro_batch_size": 0}, {"gradient_checkpointing": True}, {"compile": "no"}])
def test_what_changes_only_rounding_makes_no_other_key(kept, change):
    assert kept(adapter, experts=4, **change) == kept(adapter, experts=4)
    assert cell(**change) == cell()


def test_newer_parameters_at_their_defaults_do_not_change_the_names_of_results():
    for path in sorted((notebooks.ROOT / "book" / "results" / "sweeps").glob("04_ilora-*.json")):
        was = json.loads(path.read_text())["parameters"]
        defaults = parameters.notebook_parameters(notebooks.ROOT / "notebooks" / "04_ilora.ipynb")
        given = {name: value for name, value in was.items() if value != defaults[name]}
        (planned,) = notebooks.plan(given, ["04"])
        assert planned.parameters == was
    (planned,) = notebooks.plan({"micro_batch_size": 0, "compile": "auto"}, ["04"])
    assert planned.parameters.items() >= {"micro_batch_size": 0, "seed": 0}.items()
    assert not planned.parameters.keys() & {"compile", "quantize", "gradient_checkpointing"}


@pytest.mark.parametrize("make", [adapter, base, recommender])
def test_a_changed_copy_of_a_data_set_has_keys_of_its_own(request, make):
    """As book/own_data.md changes the words: with `replace`, which leaves the data's key as it is."""
    source, again = data.load("world", users=40), data.load("world", users=40)
    kept = request.getfixturevalue("kept")
    renamed = source.items.assign(title=source.items["title"] + "!")
    changes = [{}, {"noun": "film"}, {"verb": "watched"}, {"items": renamed}, {"events": source.events[1:]}]
    DATASET.update({number: dataclasses.replace(source, **change) for number, change in enumerate(changes)})
    assert len({kept(make, key=number) for number in range(len(changes))}) == len(changes)
    DATASET.update({"loaded": source, "again": again})
    first = kept(make, key="loaded")
    assert kept(make, key="again") == first
    again.items.loc[0, "title"] += "!"  # in place
    assert kept(make, key="again") != first == kept(make, key="loaded")


def test_the_order_of_events_decides_the_keys():
    """Sorted rows keep their index, and histories are in the order of the rows."""
    source = data.load("world", users=40)
    copies = [dataclasses.replace(source, events=events) for events in (source.events, source.events[::-1])]
    assert copies[0].content != copies[1].content
    by_item = source.events.sort_values(["user", "item"])
    object.__setattr__(source, "events", by_item)
    assert source.content not in (source.key, *(each.content for each in copies))


def test_an_encoder_is_known_by_its_weights_and_its_shape(kept):
    places = {kept(adapter, encoder=name) for name in ("one", "other weights", "other heads")}
    assert len(places) == 3


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "replies"])
def test_each_version_has_keys_of_its_own(kept, kind, monkeypatch):
    make, settings = MADE[kind]
    first = kept(make, **settings)
    monkeypatch.setattr(ilora, "__version__", "99.0")
    assert kept(make, **settings) != first


def test_replies_that_were_paid_for_outlive_a_version(monkeypatch):
    first = replies()
    monkeypatch.setattr(ilora, "__version__", "99.0")
    assert replies() == first


@pytest.mark.parametrize("make", [base, adapter, cell, job])
def test_another_embedded_model_makes_another_key(kept, make, tmp_path):
    first = kept(make)
    (tmp_path / "embedded" / "model.safetensors").write_bytes(b"another")
    second = kept(make)
    (tmp_path / "embedded" / "tokenizer.json").write_text("{}")
    assert len({first, second, kept(make)}) == 3


@pytest.mark.parametrize("make", [adapter, cell, job, saved])
def test_two_models_in_one_folder_have_two_keys(kept, make, tmp_path):
    folder = model(tmp_path / "base", b"one")
    places = [kept(make, base_model=str(folder))]
    model(folder, b"two")  # as long as the first
    places.append(kept(make, base_model=str(folder)))
    (folder / "tokenizer.json").write_text("{}")
    places.append(kept(make, base_model=str(folder)))
    assert len(set(places)) == 3
    (folder / ".cache").mkdir()
    for file in ("README.md", ".cache/lock"):
        (folder / file).write_text("no part of the model")
    assert kept(make, base_model=str(folder)) == places[-1]


@pytest.mark.parametrize("make", [recommender, cell])
def test_two_text_encoders_in_one_folder_have_two_keys(kept, make, tmp_path):
    folder = model(tmp_path / "encoder", b"one")
    settings = {"kind": "MoRec"} if make is recommender else {"system": "MoRec"}
    first = kept(make, text_encoder=str(folder), **settings)
    model(folder, b"two")
    assert kept(make, text_encoder=str(folder), **settings) != first


@pytest.mark.parametrize("make", [adapter, cell, job, saved])
def test_two_commits_of_a_model_have_two_keys(kept, make, monkeypatch):
    first = kept(make, base_model="ada/small")
    assert kept(make, base_model="ada/small") == first
    monkeypatch.setitem(COMMITS, "ada/small", "c" * 40)
    artifacts.hub_commit.cache_clear()
    assert kept(make, base_model="ada/small") != first


def test_the_commit_is_read_from_the_local_cache_and_is_what_is_loaded(tmp_path, monkeypatch):
    """Offline, with a cache as the hub's client leaves it: the model of the commit, not of another one next to it."""
    for commit, weights in (("c" * 40, 0.0), ("d" * 40, 1.0)):
        folder = tmp_path / "models--ada--tiny" / "snapshots" / commit
        shutil.copytree(EMBEDDED, folder)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state = {name: torch.full_like(value, weights) for name, value in state.items()}
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "models--ada--tiny" / "refs").mkdir()
    main = tmp_path / "models--ada--tiny" / "refs" / "main"
    main.write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pretraining.base_content("ada/tiny") == "c" * 40
    main.write_text("d" * 40)  # the hub moves on while this process runs
    model, _ = load_language_model("ada/tiny", device="cpu")
    assert not any(value.any() for value in model.parameters())


def test_a_model_without_a_commit_is_refused_in_one_sentence():
    with pytest.raises(UserError) as error:
        cell(base_model="nobody/nothing")
    assert "model 'nobody/nothing' is no folder, and not found on the hub" in str(error.value)
    assert str(error.value).endswith("and log in (hf auth login) if it is gated")
    assert "\n" not in str(error.value)


def searched(folder):
    return table_runner.Cell("SASRec", "csv", 0, 2, str(folder)).search_result


@pytest.mark.parametrize("make", [make_csv, lambda folder: cell("Popularity", "csv", data_dir=str(folder)),
                                  lambda folder: job("01", dataset="csv", data_dir=str(folder)),
                                  lambda folder: saved(dataset="csv", data_dir=str(folder)),
                                  searched])  # fmt: skip
@pytest.mark.parametrize("file", ["events.csv", "items.csv"])
def test_other_data_in_one_folder_makes_another_key(kept, make, file, tmp_path):
    folder = csv_files(tmp_path / "own")
    first = kept(make, folder)
    assert kept(make, folder) == first
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("Title 00", "Title XX") if file == "items.csv" else text[:-2] + "9\n")
    assert kept(make, folder) != first


def test_the_key_of_a_data_set_is_known_before_it_is_read(tmp_path):
    folder = csv_files(tmp_path / "own")
    assert data.source_key("csv", str(folder)) == data.load("csv", str(folder)).key
    assert data.source_key("world", users=40, seed=3) == data.load("world", users=40, seed=3).key


def test_results_that_a_notebook_reads_are_an_input(tmp_path):
    (tmp_path / "results").mkdir()
    first = job("05", results=str(tmp_path / "results"))
    (tmp_path / "results" / "04_ilora-1.json").write_text("{}")
    assert job("05", results=str(tmp_path / "results")) != first


# ---------------------------------------------------------------- end to end


def published(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


@pytest.mark.parametrize("to", ["b", "a"])
def test_a_table_of_other_data_reads_and_publishes_it(tmp_path, to):
    folders = [csv_files(tmp_path / name, seed) for seed, name in enumerate("AB")]
    for folder, target in zip(folders, ("a", to), strict=True):
        command = ["table", "--datasets", "csv", "--data-dir", str(folder), "--systems", "Popularity"]
        assert commands.main([*command, "--to", str(tmp_path / "to" / target)]) == 0
    (result,) = published(tmp_path / "to" / to)
    right = data.load("csv", str(folders[1]))
    assert result["inputs"] == {"data": right.key}
    questions = data.questions(right, "test", table_runner.SETTINGS["window"], windows="last")
    outcomes = table_runner.outcome_strings(recommenders.Popularity.from_dataset(right), questions, 5, 32)
    assert {name: result["outcomes"][f"last {name}"] for name in outcomes} == outcomes


def test_a_table_whose_data_change_on_the_way_stops(tmp_path):
    folder = csv_files(tmp_path / "own")
    one = table_runner.Cell("Popularity", "csv", 0, 1, str(folder))
    assert one.inputs
    csv_files(folder, seed=1)
    with pytest.raises(UserError, match="the files of csv changed while the table ran"):
        one.load()


def test_a_sweep_over_changed_data_runs_again(tmp_path, monkeypatch):
    """What a point runs is chapter 1's work with its result: the key that the notebook finds is the one foreseen."""
    ran = []

    def execute(planned):
        monkeypatch.chdir(notebooks.ROOT)
        values = parameters.start(planned.source.stem, dict(planned.parameters))
        source = data.load("csv", planned.parameters["data_dir"])
        ran.append(source.key)
        values.save({"events": int(source.events["item"].iloc[0])})

    monkeypatch.setattr(notebooks.Job, "run", execute)
    folder = csv_files(tmp_path / "own")
    command = ["sweep", "01", "--over", "seed", "0", "-p", "dataset", "csv", "-p", "data_dir", str(folder)]
    command += ["--to", str(tmp_path / "to")]
    assert commands.main(command) == commands.main(command) == 0
    assert len(ran) == 1
    csv_files(folder, seed=1)
    assert commands.main(command) == 0
    assert len(set(ran)) == 2
    (result,) = published(tmp_path / "to")  # in place of the result of the old data
    assert result["inputs"]["data"] == ran[-1]


@pytest.mark.slow
def test_a_notebook_finds_the_key_that_was_planned(tmp_path, monkeypatch):
    """Run for real: data by a relative folder, from another working directory than the notebook's."""
    root = tmp_path / "repo"
    (root / "notebooks").mkdir(parents=True)
    shutil.copy(notebooks.ROOT / "notebooks" / "01_data.ipynb", root / "notebooks")
    notebook = json.loads((root / "notebooks" / "01_data.ipynb").read_text())
    code = [entry for entry in notebook["cells"] if entry["cell_type"] == "code"][:2]
    last = code[1] | {
        "id": "last",
        "source": "from ilora import data\nrun.save({'items': len(data.load(dataset, data_dir).items)})",
    }
    (root / "notebooks" / "01_data.ipynb").write_text(json.dumps(notebook | {"cells": [*code, last]}))
    monkeypatch.setattr(notebooks, "ROOT", root)
    monkeypatch.setenv("PYTHONPATH", str(Path(ilora.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    csv_files(tmp_path / "own")
    assert commands.main(["--only", "01", "-p", "dataset", "csv", "-p", "data_dir", "own"]) == 0
    given = notebooks.local_paths({"dataset": "csv", "data_dir": "own"})
    (planned,) = notebooks.plan(given, ["01"])
    assert planned.result.is_file() and planned.executed.is_file()
    assert json.loads(planned.result.read_text())["inputs"]["data"] == data.source_key("csv", str(tmp_path / "own"))
    assert list((artifacts.home() / "results").glob("01_data-*.json")) == [planned.result]
    csv_files(tmp_path / "own", seed=1)
    assert notebooks.plan(given, ["01"])[0].result != planned.result


def test_the_shipped_model_counts_with_all_its_files():
    names = {file.name for file in EMBEDDED.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= names
