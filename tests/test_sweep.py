import pandas as pd
import pytest
from scipy import stats

from ilora import runs, sweep
from ilora.__main__ import Job


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
        runs.Run(job.source.stem, job.parameters).save({"LoRA": {"hit_ratio": {"value": 0.5, "n": 10}}})
        return ""

    monkeypatch.setattr(sweep, "execute", execute)
    return ran


def test_a_sweep_runs_the_grid_skips_what_is_there_and_names_what_failed(fake, capsys, tmp_path):
    command = ["02", "--over", "conflict", "0", "1", "--over", "seed", "0", "1", "2", "-p", "users", "50"]
    assert sweep.main([*command, "--jobs", "2", "--to", str(tmp_path / "out")]) == 1
    assert sorted(fake) == [0, 0, 1, 1, 2, 2]
    error = capsys.readouterr().err
    assert "02_sasrec -p users 50 -p conflict 0.0 -p seed 1 failed: UserError: seed 1 is unlucky" in error
    assert len(list((tmp_path / "out").glob("*.json"))) == 4
    fake.clear()
    assert sweep.main(command) == 1 and fake == [1, 1]  # what is there is not run again


def test_results_are_read_as_one_table(fake, tmp_path):
    sweep.main(["02", "--over", "seed", "0", "2", "--over", "conflict", "0", "0.5", "--to", str(tmp_path)])
    table = sweep.read(tmp_path)
    assert sorted(zip(table["conflict"], table["seed"], strict=True)) == [(0, 0), (0, 2), (0.5, 0), (0.5, 2)]
    assert table["LoRA.hit_ratio"].tolist() == [0.5] * 4 and "LoRA.hit_ratio.n" not in table
    with pytest.raises(runs.UserError, match="holds no results"):
        sweep.read(tmp_path / "empty")


def test_gates_are_read_of_runs_that_kept_them(home):
    gate = {"users": [7, 8], "weights": [[0.25, 0.75], [0.5, 0.5]]}
    runs.Run("04", {"experts": 2, "seed": 0}).save({"gate": gate})
    runs.Run("04", {"experts": 4, "seed": 0}).save({"gate": {"entropy": {"value": 1.0}}})
    runs.Run("04", {"experts": 8, "seed": 1}).save({"gate": gate})
    (experts, weights), *others = sweep.kept_gates(runs.home() / "results", seed=0).items()
    assert experts == 2 and not others
    assert weights.index.tolist() == [7, 8] and weights.loc[7].tolist() == [0.25, 0.75]


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
    assert sweep.main(arguments) == 1 and fake == []
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_point_runs_as_a_command_of_its_own_and_says_why_it_failed(home):
    job = sweep.points("02", {"dataset": "csv", "data_dir": str(home)}, [["seed", "0"]])[0]
    assert "events.csv" in sweep.execute(job)
    assert not job.result.is_file()


def test_published_results_name_no_folder_of_this_machine(home, tmp_path):
    (home / "artifacts").mkdir()
    job = sweep.points("02", {"dataset": "csv", "data_dir": str(home / "artifacts")}, [["seed", "0"]])[0]
    runs.Run(job.source.stem, job.parameters).save({})
    sweep.publish([job], tmp_path)
    assert str(home) not in next(tmp_path.glob("*.json")).read_text()


def test_means_over_seeds_have_students_interval():
    table = pd.DataFrame({"k": [1, 1, 1, 2], "a": [0.1, 0.2, 0.3, 0.5], "b": [1.0, 1.0, float("nan"), 1.0]})
    found = sweep.over_seeds(table, "k", {"A": "a", "B": "b"}).set_index(["system", "k"])
    low, high = stats.ttest_1samp([0.1, 0.2, 0.3], 0).confidence_interval()
    assert found.loc[("A", 1)].tolist() == pytest.approx([0.2, low, high, 3])
    assert found.loc[("B", 1)].tolist() == pytest.approx([1, 1, 1, 2])
    assert found.loc[("A", 2), "value"] == 0.5 and found.loc[("A", 2), ["low", "high"]].isna().all()  # one run
