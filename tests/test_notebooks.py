"""Every notebook runs alone at smoke size, through papermill, and leaves a whole result; bad parameters end early."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parents[1]
SMOKE = {"users": 120, "encoder_epochs": 1, "train_limit": 64, "test_limit": 16, "gradient_limit": 64, "rank": 4}
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def papermill(home, name, **parameters):
    flags = [text for pair in parameters.items() for text in ("-p", pair[0], str(pair[1]))]
    return subprocess.run(
        [Path(sys.executable).with_name("papermill"), f"notebooks/{name}.ipynb", home / f"{name}.ipynb", *flags],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "ILORA_HOME": str(home), "JUPYTER_PATH": f"{sys.prefix}/share/jupyter"},
    )  # fmt: skip


def known(name, parameters):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    return {key: value for key, value in parameters.items() if f'"{key} = ' in text}


# The last first, so that it has to make what the earlier ones would have left to it.
@pytest.mark.parametrize("name", NOTEBOOKS[::-1])
def test_a_notebook_runs_and_leaves_its_result(home, name):
    done = papermill(home, name, **known(name, SMOKE))
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (home / "results").glob(f"{name}-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["parameters"].items() >= known(name, SMOKE).items()
    assert result["metrics"]
    assert result["seconds"] > 0
    if name in ("03_lora", "04_ilora"):
        assert len(result["outcomes"]["hit"]) == SMOKE["test_limit"]
    if name == "06_gradients":
        assert result["metrics"]["groups"].keys() == {"LoRA", "iLoRA"}
        assert result["metrics"]["gate"]["between groups"]["n"] == 96  # one sequence a training user


def seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("plays", ["new", "repeated"])
def test_a_first_look_at_a_small_csv_makes_no_language_model(tmp_path, plays):
    folder, rng = tmp_path / "csv", np.random.default_rng(0)
    folder.mkdir()
    (folder / "items.csv").write_text("id,title\n" + "".join(f"i{n},Title $${n} <b>\n" for n in range(60)))
    rows = [rng.choice(60, 12, replace=False) if plays == "new" else rng.choice(8, 12) for _ in range(120)]
    events = [f"u{user},i{item},{1000 * user + n}\n" for user, row in enumerate(rows) for n, item in enumerate(row)]
    (folder / "events.csv").write_text("user,item,time\n" + "".join(events))
    before = seconds_of_children()
    done = papermill(tmp_path, "01_data", dataset="csv", data_dir=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds_of_children() - before < 30  # of processors: no more on two cores with nothing else to do
    assert {path.name for path in tmp_path.iterdir()} >= {"data", "results"}
    assert not [name for name in ("base", "training", "adapters", "recommenders") if (tmp_path / name).exists()]
    (path,) = (tmp_path / "results").glob("01_data-*.json")
    rules = json.loads(path.read_text(encoding="utf-8"))["metrics"]["rules"]
    assert (rules["in the history"]["value"] > 0.5) == (plays == "repeated")
    output = (tmp_path / "01_data.ipynb").read_text(encoding="utf-8")
    assert ("targets (" in output) == (plays == "repeated")
    assert "Each item this person chose, in order: Title" in output and "tokens of the embedded tokenizer" in output


def test_the_gates_of_ablations_run_and_say_what_they_are(tmp_path):
    given = known("04_ilora", SMOKE) | {"epochs": 2, "gate_per_layer": True, "gate_top_k": 2}
    done = papermill(tmp_path, "04_ilora", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").glob("04_ilora-*.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    assert [len(values) for values in metrics["training"]["validation"].values()] == [2, 2]  # one an epoch
    use = np.array(metrics["gate"]["use"])
    assert len(use) > 7 and use.sum(1) == pytest.approx(1)  # of each layer
    assert metrics["gate"]["entropy"]["value"] <= np.log(2) and metrics["gate"]["constant"] is False


@pytest.mark.parametrize("count", [0, 1])
def test_chapter_5_can_be_made_of_any_results(tmp_path, count):
    folder = tmp_path / "sweeps"
    folder.mkdir()
    for path in sorted((ROOT / "book" / "results" / "sweeps").glob("04_*.json"))[:count]:
        shutil.copy(path, folder)
    done = papermill(tmp_path, "05_ablations", results=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "results").glob("05_ablations-*.json"))) == 1


def cells_of(folder, keep):
    """A folder of the book's cells, each with the system and data set that `keep` wants; every other one failed."""
    folder.mkdir()
    for path in (ROOT / "book" / "results" / "table").glob("table-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if keep and keep == (result["parameters"]["dataset"], result["parameters"]["system"]):
            shutil.copy(path, folder)
    failed = {"system": "LLaRA", "dataset": "steam", "seed": 0, "draws": 5}
    (folder / "table-failed-0.json").write_text(json.dumps({"parameters": failed, "error": "RuntimeError: no memory"}))
    return folder


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("07_table", ("lastfm", "SASRec")),
        ("07_table", ("movielens", "iLoRA")),
        ("07_table", ()),
        ("08_audit", ("lastfm", "SASRec")),
        ("08_audit", ()),
    ],
)
def test_chapters_7_and_8_can_be_made_of_one_system_on_one_data_set_or_of_failures_alone(tmp_path, name, keep):
    done = papermill(tmp_path, name, results=cells_of(tmp_path / "table", keep))
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").glob(f"{name}-*.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    dataset, system = {"lastfm": "LastFM", "movielens": "MovieLens"}.get("".join(keep[:1])), "".join(keep[1:])
    if name == "07_table":
        assert {name: [*own] for name, own in metrics["last"].items()} == ({dataset: [system]} if keep else {})
        assert metrics["iLoRA - other"] == ({dataset: {}} if system == "iLoRA" else {})
    else:
        luck = metrics["luck of the draw"]
        assert {name: [*own] for name, own in luck.items()} == ({system: [dataset]} if keep else {})


TURNED = """
def seen():
    return player.prompt.value, player.gate.value, player.ranking.value

before = seen()
player.history.value = [*player.history.value, titles[0]]
longer = seen()
player.draw.value = 7
drawn = seen()
player.history.value = []
empty = seen()
print(json.dumps([before, longer, drawn, empty, titles[0], player.history.allowed_tags]))
"""


def test_the_live_widgets_follow_the_history_and_the_draw(home, monkeypatch):
    """In a kernel, as a reader would: values are set, the prompt, the gate and the ranking change with them."""
    monkeypatch.setenv("ILORA_HOME", str(home))
    monkeypatch.setenv("JUPYTER_PATH", f"{sys.prefix}/share/jupyter")
    notebook = parameterize_notebook(
        load_notebook_node(str(ROOT / "notebooks" / "11_play.ipynb")), known("11_play", SMOKE)
    )
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json{TURNED}"))
    NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    *_, printed = notebook.cells[-1].outputs
    before, longer, drawn, empty, title, offered = json.loads(printed["text"])
    prompt, gate, ranking = range(3)
    assert title not in before[prompt].split(" is one of: ")[0] and title in longer[prompt]
    assert all(one != other for one, other in zip(before, longer, strict=True))
    assert longer[gate] == drawn[gate]  # which reads the history alone
    assert longer[ranking] != drawn[ranking] and longer[prompt] != drawn[prompt]
    assert longer[ranking].count("<tr>") == 20 and longer[gate].count("<th>expert") == 4
    assert empty == ["Add a title to the history.", "", ""]
    assert len(offered) == 120


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"expert": 4}, "did you mean 'experts'?"),
        ({"epochs": 1.5}, "parameter 'epochs' must be a whole number, not 1.5"),
    ],
)
def test_a_wrong_parameter_ends_in_one_clear_line_before_any_work(tmp_path, wrong, sentence):
    done = papermill(tmp_path, "04_ilora", **wrong)
    assert done.returncode == 1
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "data").exists()
