"""Every chapter runs in a real kernel at the smallest size and leaves its whole result; bad parameters end early.

One kernel runs them all, so that torch is imported once, and forgets every name between two chapters, so that none
relies on another.  Two of them run as a reader runs them, by the command `papermill`.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from scipy import stats

from ilora import data
from ilora.language.pretraining import EMBEDDED

pytestmark = pytest.mark.book

SMALL = {"users": 60, "encoder_epochs": 1, "train_limit": 64, "test_limit": 16, "gradient_limit": 64, "rank": 4}
FEWER = {"users": 40, "train_limit": 32}  # validation, after each epoch, is most of the time
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
KERNELS = {"JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}  # the kernel python3 is that of this environment


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def kernel():
    client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3", resources={"metadata": {"path": ROOT}})
    with client.setup_kernel(env=os.environ | KERNELS):
        yield client


def known(name, parameters):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    return {key: value for key, value in parameters.items() if f'"{key} = ' in text}


def run(kernel, home, name, *more_cells, **parameters):
    """Run a chapter without the names of the last one; the executed notebook and the metrics in its result file."""
    notebook = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
    begin = f"%reset -f\nimport os\nos.environ['ILORA_HOME'] = {str(home)!r}\ndel os"
    sources = [nbformat.v4.new_code_cell(source) for source in (begin, *more_cells)]
    notebook.cells = [sources[0], *notebook.cells, *sources[1:]]
    kernel.nb = notebook
    kernel.reset_execution_trackers()
    for index, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, index)
    return notebook, result_of(home, name)


def solutions(name):
    """The Python blocks of a chapter's exercises."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def result_of(home, name):
    (path,) = (home / "results").glob(f"{name}-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


# The last first, so that it has to make what the earlier ones would have left to it.
@pytest.mark.parametrize("name", [name for name in CHAPTERS[::-1] if name not in ("04_ilora", "11_play")])
def test_a_chapter_runs_and_leaves_its_result(kernel, home, name):
    notebook, result = run(kernel, home, name, *solutions(name), **known(name, SMALL))
    captioned = [cell for cell in notebook.cells if "figure" in cell.metadata.get("mystnb", {})]
    shown = [cell.source for cell in captioned if any("image" in str(out) for out in cell.outputs)]
    assert not [cell.source for cell in captioned if cell.source not in shown and "\nif " not in f"\n{cell.source}"]
    assert result["parameters"].items() >= known(name, SMALL).items()
    assert result["metrics"]
    assert result["seconds"] > 0
    if name == "03_lora":
        assert len(result["outcomes"]["hit"]) == SMALL["test_limit"]
    if name == "06_gradients":
        assert result["metrics"]["groups"].keys() == {"LoRA", "iLoRA"}
        assert result["metrics"]["gate"]["between groups"]["n"] == 48  # one sequence a training user


def test_the_gates_of_ablations_run_and_say_what_they_are(kernel, home):
    given = known("04_ilora", SMALL | FEWER) | {"epochs": 2, "gate_per_layer": True, "gate_top_k": 2}
    _, result = run(kernel, home, "04_ilora", *solutions("04_ilora"), **given)
    metrics = result["metrics"]
    assert len(result["outcomes"]["hit"]) == SMALL["test_limit"]
    assert [len(values) for values in metrics["training"]["validation"].values()] == [2, 2]  # one an epoch
    use = np.array(metrics["gate"]["use"])
    assert len(use) > 7 and use.sum(1) == pytest.approx(1)  # of each layer
    assert metrics["gate"]["entropy"]["value"] <= np.log(2) and metrics["gate"]["constant"] is False


TURN_THE_WIDGETS = """
import json

def shown():
    return player.prompt.value, player.question.value

before = shown()
player.history.value = [*player.history.value, titles[0]]
longer = shown()
player.draw.value = 7
drawn = shown()
player.history.value = []
empty = shown()
print(json.dumps([before, longer, drawn, empty, titles[0], player.history.allowed_tags]))
"""


def test_the_live_chapter_runs_and_its_widgets_follow_the_history_and_the_draw(kernel, home):
    """As for a reader: values are set, and the prompt, the gate and the ranking change with them."""
    notebook, result = run(kernel, home, "11_play", TURN_THE_WIDGETS, **known("11_play", SMALL))
    assert result["metrics"].keys() >= {"shares", "first", "kinds"}
    *_, printed = notebook.cells[-1].outputs
    before, longer, drawn, empty, title, offered = json.loads(printed["text"])
    prompt, question = range(2)
    assert title not in before[prompt].split(" is one of: ")[0] and title in longer[prompt]
    assert all(old != new for old, new in zip(before, longer, strict=True))
    assert longer[question] != drawn[question] and longer[prompt] != drawn[prompt]
    pages = [BeautifulSoup(shown[question], "html.parser") for shown in (longer, drawn)]
    assert len({page.select_one(".gate")["aria-label"] for page in pages}) == 1  # the gate depends on the history alone
    assert [len(page.select("tbody tr")) for page in pages] == [20, 20]
    assert len(pages[0].select(".gate span")) == 4
    assert empty == ["", "Add a title to the history."]
    assert len(offered) == 120


# ---------------------------------------------------------------- other inputs


def test_the_solutions_of_chapter_5_run_and_its_p_values_are_adjusted(kernel, tmp_path):
    notebook, result = run(kernel, tmp_path, "05_ablations", *solutions("05_ablations"))
    assert notebook.cells[-1].outputs[0]["text"].split() == ["0.636", "0.043"]  # as the solution says
    (table,) = (cell for cell in notebook.cells if "adjusted p" in cell.source and "cummin" in cell.source)
    assert "adjusted p" in table.outputs[0]["data"]["text/html"]
    p = pd.DataFrame(result["metrics"]["differences"])[["p", "adjusted p"]].dropna()
    assert p["adjusted p"].tolist() == pytest.approx(stats.false_discovery_control(p["p"]).tolist())


@pytest.mark.parametrize("count", [0, 1])
def test_chapter_5_can_be_made_of_any_results(kernel, tmp_path, count):
    folder = tmp_path / "sweeps"
    folder.mkdir()
    for path in sorted((ROOT / "book" / "results" / "sweeps").glob("04_*.json"))[:count]:
        shutil.copy(path, folder)
    run(kernel, tmp_path, "05_ablations", results=str(folder))


@pytest.mark.parametrize("name", ["adapter_cpu", "language_cpu", "several_gpus_cuda"])
def test_the_page_of_speed_can_be_made_of_one_benchmark(kernel, tmp_path, name):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    shutil.copy(ROOT / "book" / "results" / "benchmarks" / f"{name}.json", folder)
    run(kernel, tmp_path, "09_speed", results=str(folder))


@pytest.mark.parametrize("name", ["04_ilora", "06_gradients"])
def test_chapters_4_and_6_run_where_no_groups_of_users_are_known(kernel, tmp_path, name):
    """On the world as a reader's CSV, whose words the embedded model knows: it is not trained first."""
    world, folder = data.make_world(users=FEWER["users"]), tmp_path / "csv"
    folder.mkdir()
    world.items.to_csv(folder / "items.csv", index=False)
    world.events.to_csv(folder / "events.csv", index=False)
    given = known(name, SMALL | FEWER) | {"dataset": "csv", "data_dir": str(folder), "base_model": str(EMBEDDED)}
    notebook, result = run(kernel, tmp_path, name, *solutions(name), **given)
    assert "between groups" not in result["metrics"]["gate"]
    glued = [
        out for cell in notebook.cells for out in cell.get("outputs", []) if "scrapbook" in out.get("metadata", {})
    ]
    assert "an unknown share" in str(glued)


def results_on(folder, *datasets):
    """A folder with results of chapter 6 as if they were on these data sets, over SmolLM2."""
    folder.mkdir()
    path, *_ = sorted((ROOT / "book" / "results" / "gradients").glob("06_*.json"))
    result = json.loads(path.read_text(encoding="utf-8"))
    result["metrics"]["ten readers"] = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1]] * 5
    for dataset in datasets:
        changed = result["parameters"] | {"dataset": dataset, "base_model": "smollm2"}
        (folder / f"06_gradients-{dataset}.json").write_text(json.dumps(result | {"parameters": changed}))
    return str(folder)


def test_chapter_6_shows_the_results_on_real_data_that_there_are(kernel, tmp_path):
    """Those of two data sets; its cells are then run again for those of one, and for none."""
    folders = [results_on(tmp_path / str(len(names)), *names) for names in (("movielens", "lastfm"), ("lastfm",), ())]
    cells = nbformat.read(ROOT / "notebooks" / "06_gradients.ipynb", 4).cells
    section = [cell.source for cell in cells if "on_data" in cell.source]
    again = [source for folder in folders[1:] for source in (f"results = {folder!r}", *section)]
    given = known("06_gradients", SMALL | FEWER) | {"results": folders[0]}
    notebook, _ = run(kernel, tmp_path, "06_gradients", *again, **given)
    shown = [str(cell.get("outputs", "")) for cell in notebook.cells if "on_data" in cell.source]
    for part in range(3):
        outputs = shown[part * len(section) : (part + 1) * len(section)]
        assert ("MovieLens" in str(outputs), "LastFM" in str(outputs)) == (part < 1, part < 2)
        assert sum("image/" in output for output in outputs) == (2 if part < 2 else 0)
    assert "no results on real data" in str(outputs)


def cells_of(folder, keep):
    """A folder with the book's cells of one data set and system, and one cell that failed."""
    folder.mkdir()
    for path in (ROOT / "book" / "results" / "table").glob("table-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if keep and keep == (result["parameters"]["dataset"], result["parameters"]["system"]):
            shutil.copy(path, folder)
    failed = {"system": "LLaRA", "dataset": "steam", "seed": 0, "draws": 5}
    (folder / "table-failed-0.json").write_text(json.dumps({"parameters": failed, "error": "RuntimeError: no memory"}))
    return str(folder)


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
def test_chapters_7_and_8_can_be_made_of_one_system_on_one_data_set_or_of_failures_alone(kernel, tmp_path, name, keep):
    _, result = run(kernel, tmp_path, name, results=cells_of(tmp_path / "table", keep))
    metrics = result["metrics"]
    dataset, system = {"lastfm": "LastFM", "movielens": "MovieLens"}.get("".join(keep[:1])), "".join(keep[1:])
    if name == "07_table":
        assert {name: [*systems] for name, systems in metrics["last"].items()} == ({dataset: [system]} if keep else {})
        assert metrics["iLoRA - other"] == ({dataset: {}} if system == "iLoRA" else {})
    else:
        luck = metrics["luck of the draw"]
        assert {name: [*datasets] for name, datasets in luck.items()} == ({system: [dataset]} if keep else {})


# ---------------------------------------------------------------- a reader's commands


def papermill(home, name, **parameters):
    flags = [text for pair in parameters.items() for text in ("-p", pair[0], str(pair[1]))]
    return subprocess.run(
        [Path(sys.executable).with_name("papermill"), f"notebooks/{name}.ipynb", home / f"{name}.ipynb", *flags],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | KERNELS | {"ILORA_HOME": str(home)},
    )  # fmt: skip


def write_csv(folder, plays):
    """60 items and 120 users with 12 events each, of items that are new to the user or that come again."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "items.csv").write_text("id,title\n" + "".join(f"i{n},Title $${n} <b>\n" for n in range(60)))
    rows = [rng.choice(60, 12, replace=False) if plays == "new" else rng.choice(8, 12) for _ in range(120)]
    events = [f"u{user},i{item},{1000 * user + n}\n" for user, row in enumerate(rows) for n, item in enumerate(row)]
    (folder / "events.csv").write_text("user,item,time\n" + "".join(events))
    return str(folder)


def check_the_first_look(output, home, plays):
    assert {path.name for path in home.iterdir()} >= {"data", "results"}
    assert not [name for name in ("base", "training", "adapters", "recommenders") if (home / name).exists()]
    rules = result_of(home, "01_data")["metrics"]["rules"]
    assert (rules["in the history"]["value"] > 0.5) == (plays == "repeated")
    assert ("targets (" in output) == (plays == "repeated")
    assert "Each item this person chose, in order: Title" in output and "tokens of the embedded tokenizer" in output


def seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_first_look_at_a_small_csv_takes_seconds_and_makes_no_language_model(tmp_path):
    before = seconds_of_children()
    done = papermill(tmp_path, "01_data", dataset="csv", data_dir=write_csv(tmp_path / "csv", "new"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds_of_children() - before < 30  # of processors: no more on two cores with nothing else to do
    check_the_first_look((tmp_path / "01_data.ipynb").read_text(encoding="utf-8"), tmp_path, "new")


def test_a_first_look_at_a_csv_with_repeats_counts_them(kernel, tmp_path):
    data_dir = write_csv(tmp_path / "csv", "repeated")
    notebook, _ = run(kernel, tmp_path, "01_data", dataset="csv", data_dir=data_dir)
    check_the_first_look(nbformat.writes(notebook), tmp_path, "repeated")


def test_a_wrong_parameter_ends_in_one_clear_line_before_any_work(tmp_path):
    done = papermill(tmp_path, "04_ilora", expert=4)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "UserError: there is no parameter 'expert' in 04_ilora: did you mean 'experts'?"
    assert "parameters.py" not in done.stderr  # no traceback of the package above it
    assert not (tmp_path / "data").exists()
