"""Seeds and devices, atomic files and folders, and the result of a run."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ilora
from ilora import artifacts, devices
from ilora.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---------------------------------------------------------------- devices


def test_pick_device():
    assert devices.pick_device("cpu") == torch.device("cpu")
    assert devices.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "cpu:", "cpu:-1", "cpu:²"])
def test_pick_device_refuses_other_names(device):
    with pytest.raises(UserError, match="device must be auto"):
        devices.pick_device(device)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_home_that_cannot_be_written_to_is_refused_in_one_sentence(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / place))
    with pytest.raises(UserError, match=f"{place}: set ILORA_HOME to a folder that you can write to"):
        artifacts.home()


def test_a_home_that_is_read_only_is_refused(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="home: set ILORA_HOME"):
        artifacts.home()


def test_home_comes_from_the_environment_or_is_in_the_working_directory(home, tmp_path, monkeypatch):
    assert artifacts.home() == home
    assert home.is_dir()
    monkeypatch.delenv("ILORA_HOME")
    monkeypatch.chdir(tmp_path)
    assert artifacts.home() == tmp_path / "artifacts"


def test_key_depends_only_on_values():
    assert artifacts.key({"a": 1, "b": [1.5, None]}, {}) == artifacts.key({"b": (1.5, None), "a": 1}, {})
    assert len(artifacts.key({}, {})) == 12
    assert artifacts.key({"a": 1}, {}) != artifacts.key({"a": 2}, {})
    for value in ({1, 2}, Path(), np.int64(1)):
        with pytest.raises(TypeError):
            artifacts.key({"a": value}, {})
    with pytest.raises(ValueError, match="JSON"):
        artifacts.key({"a": float("nan")}, {})


def test_write_atomic_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    artifacts.write_atomic(path, "one ü")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*file.txt \(disk full\): make room and start again"):
        artifacts.write_atomic(path, b"two")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert list(path.parent.iterdir()) == [path]


def test_write_json_takes_numpy_and_refuses_nan(tmp_path):
    path = tmp_path / "x.json"
    artifacts.write_json(path, {"b": np.arange(2), "a": np.float32(0.5), "c": np.bool_(True)})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": True}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(path, {"a": np.float32("nan")})
    with pytest.raises(AttributeError, match="'set' object"):
        artifacts.write_json(path, {"a": {1}})


def test_atomic_folder_appears_completely_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with artifacts.atomic_folder(path, "one") as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), artifacts.atomic_folder(path, "one") as folder:
        (folder / "no" / "such").write_text("2")
    assert [file.name for file in path.rglob("*")] == ["one"]
    with artifacts.atomic_folder(path, "one") as folder:
        (folder / "three").write_text("3")
    assert [file.name for file in path.rglob("*")] == ["three"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused = pytest.raises(UserError, match="holds other files than a saved folder with one")
    with refused, artifacts.atomic_folder(tmp_path, "one"):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_simultaneous_runs_make_a_folder_once(home):
    made = []

    def make(folder, _):
        time.sleep(0.2)
        made.append(folder)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: artifacts.cached("data", {"seed": 1}, {}, make), range(4)))
    assert len(made) == 1 and len(folders) == 1


def test_cached_makes_once_and_again_after_a_failure(home):
    made = []

    def make(folder, work):
        made.append(folder)
        work.mkdir(parents=True, exist_ok=True)
        if len(made) == 1:
            (work / "step-1").touch()
            raise OSError("killed")
        assert (work / "step-1").is_file()
        (folder / "data.txt").write_text("x")

    with pytest.raises(OSError, match="killed"):
        artifacts.cached("data", {"seed": 1}, {"file": "a"}, make)
    first = artifacts.cached("data", {"seed": 1}, {"file": "a"}, make, note="one line")
    assert artifacts.cached("data", {"seed": 1}, {"file": "a"}, make) == first
    assert first == home / "data" / artifacts.key({"seed": 1}, {"file": "a"})
    assert len(made) == 2 and not list((home / "training").iterdir())
    about = {"version": ilora.__version__, "inputs": {"file": "a"}, "settings": {"seed": 1}}
    assert json.loads((first / "parameters.json").read_text()) == about


# ---------------------------------------------------------------- results


def test_a_result_records_the_run_and_its_outcome(home):
    run = artifacts.Run("04_ilora", {"seed": 1, "device": "cpu"}, {"data": "abc"})
    path = run.save({"HitRatio@1": {"value": 0.5, "count": 2}}, pd.DataFrame({"hit": [True, False]}))
    result = json.loads(path.read_text())
    assert path == home / "results" / f"04_ilora-{artifacts.key(run.parameters, {'data': 'abc'})}.json"
    assert result["inputs"] == {"data": "abc"}
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


def test_commit_is_of_the_packages_checkout(tmp_path, monkeypatch):
    package = tmp_path / "ilora"
    package.mkdir()
    (package / "artifacts.py").write_text("# one\n")
    monkeypatch.setattr(artifacts, "__file__", str(package / "artifacts.py"))
    assert artifacts.commit() == "unknown (not a checkout)"
    git(tmp_path, "init", "--quiet")
    assert artifacts.commit() == "unknown (not a checkout)"  # the package is in a checkout of another project
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    assert artifacts.commit() == git(tmp_path, "rev-parse", "HEAD")
    (package / "artifacts.py").write_text("# two\n")
    assert artifacts.commit() == git(tmp_path, "rev-parse", "HEAD") + "+dirty"
