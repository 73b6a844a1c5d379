import json

import pytest

from ilora import artifacts, data
from ilora.errors import UserError
from ilora.study import book, notebooks, runner
from ilora.study.commands import main
from ilora.study.notebooks import Job

pytestmark = pytest.mark.book


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "artifacts"))
    return tmp_path


@pytest.fixture
def fake(monkeypatch, home):
    """Runs write a result at once; those with seed 1 fail."""
    ran = []

    def run(job):
        ran.append(job.parameters["seed"])
        if job.parameters["seed"] == 1:
            raise UserError("seed 1 is unlucky")
        artifacts.Run(job.source.stem, job.parameters, job.inputs).save({"LoRA": {"value": 0.5}})

    monkeypatch.setattr(Job, "run", run)
    return ran


def test_a_sweep_runs_the_grid_skips_what_is_there_and_names_what_failed(fake, capsys, tmp_path):
    command = ["sweep", "02", "--over", "conflict", "0", "1", "--over", "seed", "0", "1", "2", "-p", "users", "50"]
    assert main([*command, "--to", str(tmp_path / "out")]) == 1
    assert sorted(fake) == [0, 0, 1, 1, 2, 2]
    error = capsys.readouterr().err
    assert "02_sasrec -p users 50 -p conflict 0.0 -p seed 1 failed: UserError: seed 1 is unlucky" in error
    assert len(list((tmp_path / "out").glob("*.json"))) == 4
    fake.clear()
    assert main(command) == 1 and fake == [1, 1]  # what is there is not run again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["02", "--over", "seed", "0", "-p", "seed", "1"], "given twice"),
        (["02", "--over", "seed"], "names no values"),
        (["02", "--over", "sed", "0"], "did you mean 'seed'"),
        (["02", "--over", "seed", "one"], "must be a whole number"),
        (["02", "--over", "seed", "0", "--jobs", "0"], "--jobs must be at least 1"),
        (["02", "--over", "seed", "0", "--minutes", "nan"], "--minutes 0 or more"),
        (["99", "--over", "seed", "1"], "no notebook '99'"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_in_one_line_before_any_run(fake, capsys, arguments, message):
    assert main(["sweep", *arguments]) == 1 and fake == []
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_point_whose_data_are_missing_is_refused_before_any_run(home):
    job = notebooks.points("02", {"dataset": "csv", "data_dir": str(home)}, [["seed", "0"]])[0]
    with pytest.raises(UserError, match=r"events.csv is missing"):
        list(runner.run_cells([job]))


def test_points_run_in_processes_of_their_own_and_a_failure_gives_its_last_line(home, tmp_path, capsys):
    """A real notebook, chapter 8 on a folder without results."""
    (tmp_path / "results").mkdir()
    jobs = notebooks.points("08", {"results": str(tmp_path / "results")}, [["seed", "0"]])
    ((job, reason),) = runner.run_cells(jobs, jobs=2)
    assert reason.startswith("UserError: ") and "contains no results" in reason
    assert f"ilora: {job} failed: {reason}" in capsys.readouterr().err
    assert job.executed.is_file() and not job.result.is_file()


def test_published_results_name_no_folder_of_this_machine(home, tmp_path):
    (home / "artifacts").mkdir()
    job = notebooks.points("02", {"data_dir": str(home / "artifacts")}, [["seed", "0"]])[0]
    artifacts.Run(job.source.stem, job.parameters, job.inputs).save({})
    book.publish([job], tmp_path)
    assert str(home) not in next(tmp_path.glob("*.json")).read_text()


@pytest.mark.parametrize("dataset", ["world", "movielens"])
def test_published_results_hold_single_users_of_the_world_alone(home, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(data, "source_key", lambda **_: "the key of its files")
    job = notebooks.points("02", {"dataset": dataset}, [["seed", "0"]])[0]
    artifacts.Run(job.source.stem, job.parameters, job.inputs).save({"n": 1}, {"user": [7], "hit": [True]})
    book.publish([job], tmp_path)
    result = json.loads((tmp_path / job.result.name).read_text(encoding="utf-8"))
    assert result["metrics"] == {"n": 1}
    assert result["outcomes"] == ({"user": [7], "hit": [True]} if dataset == "world" else {})
