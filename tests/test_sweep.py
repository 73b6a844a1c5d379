import json

import pytest

from ilora import artifacts, data
from ilora.errors import UserError
from ilora.study import notebook_sweep
from ilora.study.running import Job


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "artifacts"))
    return tmp_path


@pytest.fixture
def fake(monkeypatch, home):
    """Runs write a result at once; those with seed 1 fail."""
    ran = []

    def execute(job: Job) -> str:
        ran.append(job.parameters["seed"])
        if job.parameters["seed"] == 1:
            return "UserError: seed 1 is unlucky"
        artifacts.Run(job.source.stem, job.parameters, job.inputs).save(
            {"LoRA": {"hit_ratio": {"value": 0.5, "n": 10}}}
        )
        return ""

    monkeypatch.setattr(notebook_sweep, "execute", execute)
    return ran


def test_a_sweep_runs_the_grid_skips_what_is_there_and_names_what_failed(fake, capsys, tmp_path):
    command = ["02", "--over", "conflict", "0", "1", "--over", "seed", "0", "1", "2", "-p", "users", "50"]
    assert notebook_sweep.main([*command, "--jobs", "2", "--to", str(tmp_path / "out")]) == 1
    assert sorted(fake) == [0, 0, 1, 1, 2, 2]
    error = capsys.readouterr().err
    assert "02_sasrec -p users 50 -p conflict 0.0 -p seed 1 failed: UserError: seed 1 is unlucky" in error
    assert len(list((tmp_path / "out").glob("*.json"))) == 4
    fake.clear()
    assert notebook_sweep.main(command) == 1 and fake == [1, 1]  # what is there is not run again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["02", "--over", "seed", "0", "-p", "seed", "1"], "given twice"),
        (["02", "--over", "seed"], "names no values"),
        (["02", "--over", "sed", "0"], "did you mean 'seed'"),
        (["02", "--over", "seed", "one"], "must be a whole number"),
        (["02", "--over", "seed", "0", "--jobs", "0"], "--jobs must be at least 1"),
        (["99", "--over", "seed", "1"], "no notebook '99'"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_in_one_line_before_any_run(fake, capsys, arguments, message):
    assert notebook_sweep.main(arguments) == 1 and fake == []
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_point_runs_as_a_command_of_its_own_and_says_why_it_failed(home):
    job = notebook_sweep.points("02", {"dataset": "csv", "data_dir": str(home)}, [["seed", "0"]])[0]
    assert "events.csv" in notebook_sweep.execute(job)
    with pytest.raises(UserError, match=r"events.csv is missing"):  # as a sweep says before any run
        notebook_sweep.run([job])


def test_published_results_name_no_folder_of_this_machine(home, tmp_path):
    (home / "artifacts").mkdir()
    job = notebook_sweep.points("02", {"data_dir": str(home / "artifacts")}, [["seed", "0"]])[0]
    artifacts.Run(job.source.stem, job.parameters, job.inputs).save({})
    notebook_sweep.publish([job], tmp_path)
    assert str(home) not in next(tmp_path.glob("*.json")).read_text()


@pytest.mark.parametrize("dataset", ["world", "movielens"])
def test_published_results_hold_single_users_of_the_world_alone(home, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(data, "source_key", lambda **_: "the key of its files")
    job = notebook_sweep.points("02", {"dataset": dataset}, [["seed", "0"]])[0]
    artifacts.Run(job.source.stem, job.parameters, job.inputs).save({"n": 1}, {"user": [7], "hit": [True]})
    notebook_sweep.publish([job], tmp_path)
    result = json.loads((tmp_path / job.result.name).read_text(encoding="utf-8"))
    assert result["metrics"] == {"n": 1}
    assert result["outcomes"] == ({"user": [7], "hit": [True]} if dataset == "world" else {})
