"""Parameters and their errors, files that are whole or absent, and the result of a run."""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from ilora import runs
from ilora.runs import UserError

PARAMETERS_CELL = 'dataset = "world"  # which\nseed = 0\nrank = 8\nalpha = 32\nexperts = 4\ndata_dir = ""'
START_CELL = 'from ilora import runs\nrun = runs.start("04_ilora", globals())\nprint(run.parameters)'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def notebook_globals(*cells):
    """What a notebook's globals hold when the cell that calls runs.start runs, after `cells`."""
    namespace = {}
    for cell in cells:
        exec(cell, namespace)
    return namespace | {"In": ["", *cells, START_CELL]}


# ---------------------------------------------------------------- parameters

REFUSED = [
    ({"expert": 4}, "there is no parameter 'expert': did you mean 'experts'?"),
    ({"zzz": 4}, "there is no parameter 'zzz': the parameters are dataset, data_dir"),
    ({"experts": 4.0}, "'experts' must be a whole number, not 4.0 (float)"),
    ({"experts": "4.0"}, "'experts' must be a whole number, not '4.0' (str)"),
    ({"epochs": True}, "'epochs' must be a whole number, not True (bool)"),
    ({"alpha": False}, "'alpha' must be a number, not False (bool)"),
    ({"data_dir": 2024}, "'data_dir' must be text, not 2024 (int) (papermill: -r data_dir 2024"),
    ({"seed": None}, "'seed' must be a whole number, not None (NoneType)"),
    ({"epochs": -1}, "'epochs' must be at least 1, not -1"),
    ({"users": 39}, "'users' must be at least 40, not 39"),
    ({"conflict": 1.5}, "'conflict' must be from 0 to 1, not 1.5"),
    ({"conflict": float("nan")}, "'conflict' must be from 0 to 1, not nan"),
    ({"learning_rate": 0}, "'learning_rate' must be above 0 and below 1, not 0.0"),
    ({"dropout": 1}, "'dropout' must be from 0 to below 1, not 1.0"),
    ({"alpha": float("inf")}, "'alpha' must be above 0, not inf"),
    ({"dataset": "wrold"}, "must be one of world, movielens, lastfm, steam, llara, csv, not 'wrold'"),
    ({"eval_windows": "some"}, "'eval_windows' must be one of last, all, not 'some'"),
    ({"data_dir": "/no/such/folder"}, "'data_dir' must be empty or a folder that exists"),
    ({"base_model": " "}, "'base_model' must be 'embedded' or the name"),
    (
        {"experts": 3, "rank": 8},
        "experts = 3 does not divide rank = 8: choose experts among 1, 2, 4, 8",
    ),
    ({"dataset": "csv", "data_dir": ""}, "dataset = 'csv' needs data_dir"),
    ({"device": "gpu"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
    ({"device": "cuda:x"}, "device must be auto, cpu, cuda, cuda:N or mps, not 'cuda:x'"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_a_wrong_parameter_is_refused_in_one_line(given, message):
    with pytest.raises(UserError) as error:
        runs.check_parameters(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_accepted_where_a_number_is_meant_and_becomes_one():
    values = runs.check_parameters({"alpha": 32, "rank": 8})
    assert values == {"alpha": 32.0, "rank": 8}
    assert type(values["alpha"]) is float


def test_every_parameter_says_what_it_means():
    for name, parameter in runs.PARAMETERS.items():
        assert name.isidentifier()
        assert parameter.meaning
        assert parameter.must


def test_command_line_pairs_are_read_by_type():
    pairs = [("experts", "2"), ("alpha", "16"), ("data_dir", ""), ("dataset", "world")]
    assert runs.parse_parameters(pairs) == {"experts": 2, "alpha": 16.0, "data_dir": "", "dataset": "world"}
    for pair, message in [(("experts", "4.0"), "a whole number, not '4.0'"), (("expert", "4"), "'experts'?")]:
        with pytest.raises(UserError, match=message):
            runs.parse_parameters([pair])


def test_start_returns_checked_parameters_and_puts_them_in_the_notebook():
    namespace = notebook_globals(PARAMETERS_CELL, "# Parameters\nexperts = 2\n")
    run = runs.start("04_ilora", namespace)
    assert run.parameters == {
        "dataset": "world", "data_dir": "", "seed": 0, "rank": 8, "alpha": 32.0, "experts": 2
    }  # fmt: skip
    assert type(namespace["alpha"]) is float


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("expert = 4", "there is no parameter 'expert' in 04_ilora: did you mean 'experts'?"),
        (
            "window = 5",
            "there is no parameter 'window' in 04_ilora: the parameters are dataset, seed, rank",
        ),
        ("experts = 3", "experts = 3 does not divide rank = 8"),
    ],
)
def test_start_refuses_what_papermill_injects_wrongly(injected, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        runs.start("04_ilora", notebook_globals(PARAMETERS_CELL, f"# Parameters\n{injected}\n"))


def test_start_sees_a_name_misspelt_in_the_parameters_cell():
    with pytest.raises(UserError, match="did you mean 'rank'"):
        runs.start("04_ilora", notebook_globals("seed = 0\nrnak = 8"))


@pytest.mark.parametrize("other", ["answer = 42", "import json", "%matplotlib inline", "experts = 8"])
def test_start_can_be_run_again_in_a_live_notebook(other):
    """Other cells have run since the parameters cell; their variables are no parameters."""
    namespace = notebook_globals(PARAMETERS_CELL) | {"answer": 42}
    namespace["In"] = ["", PARAMETERS_CELL, START_CELL, other, START_CELL]
    assert set(runs.start("04_ilora", namespace).parameters) >= {"experts", "rank", "seed"}


def papermill(folder, *arguments):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [
        nbformat.v4.new_code_cell(PARAMETERS_CELL, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(START_CELL),
    ]
    nbformat.write(notebook, folder / "source.ipynb")
    command = [sys.executable, "-m", "papermill", "source.ipynb", "out.ipynb", "-k", "python3", *arguments]
    path = os.pathsep.join([str(Path(runs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_papermill_ends_in_one_clear_last_line(tmp_path):
    done = papermill(tmp_path, "-p", "expert", "4")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "UserError: there is no parameter 'expert' in 04_ilora: did you mean 'experts'?"
    assert "runs.py" not in done.stderr  # no stack of ours above it


def test_papermill_runs_with_right_parameters(tmp_path):
    done = papermill(tmp_path, "-p", "experts", "2")
    assert done.returncode == 0, done.stderr
    assert "'experts': 2" in (tmp_path / "out.ipynb").read_text()


# ---------------------------------------------------------------- seeds and device


def test_seed_all_repeats_every_generator():
    draws = []
    for _ in range(2):
        runs.seed_all(7)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_pick_device():
    assert runs.pick_device("cpu") == torch.device("cpu")
    assert runs.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- files


def test_home_is_named_by_the_environment_or_lies_in_the_working_directory(home, tmp_path, monkeypatch):
    assert runs.home() == home
    assert home.is_dir()
    monkeypatch.delenv("ILORA_HOME")
    monkeypatch.chdir(tmp_path)
    assert runs.home() == tmp_path / "artifacts"


def test_key_depends_on_values_alone():
    assert runs.key({"a": 1, "b": [1.5, None]}) == runs.key({"b": (1.5, None), "a": 1})
    assert len(runs.key({})) == 12
    assert runs.key({"a": 1}) != runs.key({"a": 2})
    for value in ({1, 2}, Path(), np.int64(1)):
        with pytest.raises(TypeError):
            runs.key({"a": value})
    with pytest.raises(ValueError, match="JSON"):
        runs.key({"a": float("nan")})


def test_write_atomic_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    runs.write_atomic(path, "one ü")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        runs.write_atomic(path, b"two")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert list(path.parent.iterdir()) == [path]


def test_write_json_takes_numpy_and_refuses_nan(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, {"b": np.arange(2), "a": np.float32(0.5), "c": np.bool_(True)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": True}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(path, {"a": np.float32("nan")})
    with pytest.raises(TypeError, match="set is not JSON"):
        runs.write_json(path, {"a": {1}})


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with runs.atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("1")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), runs.atomic_folder(path) as folder:
        (folder / "no" / "such").write_text("2")
    assert [file.name for file in path.rglob("*")] == ["sub", "one"]
    with runs.atomic_folder(path) as folder:
        (folder / "three").write_text("3")
    assert [file.name for file in path.rglob("*")] == ["three"]
    assert list(path.parent.iterdir()) == [path]


def test_runs_at_the_same_time_make_it_once(home):
    made = []

    def make(folder):
        time.sleep(0.2)
        made.append(folder)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: runs.cached("data", {"seed": 1}, make), range(4)))
    assert len(made) == 1 and len(folders) == 1


def test_cached_makes_once_and_again_after_a_failure(home):
    made = []

    def make(folder):
        made.append(folder)
        if len(made) == 1:
            raise OSError("killed")
        (folder / "data.txt").write_text("x")

    with pytest.raises(OSError, match="killed"):
        runs.cached("data", {"seed": 1}, make)
    first = runs.cached("data", {"seed": 1}, make, note="one line")
    assert runs.cached("data", {"seed": 1}, make) == first == home / "data" / runs.key({"seed": 1})
    assert len(made) == 2
    assert json.loads((first / "parameters.json").read_text()) == {"seed": 1}


# ---------------------------------------------------------------- results


def test_a_result_says_what_was_run_where_and_what_came_out(home):
    with runs.Run("04_ilora", {"seed": 1, "device": "cpu"}) as run:
        pass
    assert run.seconds == run.seconds
    path = run.save({"HitRatio@1": {"value": 0.5, "count": 2}}, pd.DataFrame({"hit": [True, False]}))
    result = json.loads(path.read_text())
    assert path == home / "results" / f"04_ilora-{runs.key(run.parameters)}.json"
    assert result["parameters"] == {"seed": 1, "device": "cpu"}
    assert result["metrics"]["HitRatio@1"]["value"] == 0.5
    assert result["outcomes"] == {"hit": [True, False]}
    assert result["seconds"] >= 0
    assert 10 < result["peak_memory_mib"] < 1e6
    assert result["device"]["type"] == "cpu"
    assert result["device"]["threads"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    assert set(result) >= {"commit", "date", "name"}


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.check_output(["git", "-C", folder, *identity, *arguments], text=True).strip()


def test_commit_is_that_of_the_packages_checkout(tmp_path, monkeypatch):
    package = tmp_path / "ilora"
    package.mkdir()
    (package / "runs.py").write_text("# one\n")
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    assert runs.commit() == "unknown (not a checkout)"
    git(tmp_path, "init", "--quiet")
    assert runs.commit() == "unknown (not a checkout)"  # a package that lies in somebody else's checkout
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    assert runs.commit() == git(tmp_path, "rev-parse", "HEAD")
    (package / "runs.py").write_text("# two\n")
    assert runs.commit() == git(tmp_path, "rev-parse", "HEAD") + "+dirty"
