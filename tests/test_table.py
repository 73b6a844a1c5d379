"""Cells on the small world, really run: same questions for all, resumed, failed and shown as failed, and loaded."""

import json
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ilora import data, recommenders
from ilora.recommenders import Popularity, training
from ilora.study import comparisons, paper, runner, systems, table_results, table_runner
from ilora.study.commands import main
from ilora.study.results import without_nan

pytestmark = pytest.mark.book

FEW = {"users": 60, "test_limit": 12, "train_limit": 16, "base_model": "embedded", "device": "cpu"}
SETTINGS = systems.SETTINGS | FEW
SMALL = ["Popularity", "Language model", "iLoRA"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    monkeypatch.setattr(systems, "trained", lambda dataset, kind, seed, settings: encoder(dataset))
    return tmp_path


def encoder(dataset):
    """An untrained SASRec: what is tested here is the table, not the recommenders."""
    from ilora.recommenders import SASRec

    return SASRec(len(dataset.items)).eval()


def some(names=SMALL, seeds=(0,), draws=2, **settings):
    return table_runner.cells(["world"], names, list(seeds), draws, "", SETTINGS | settings)


def test_every_row_of_the_paper_is_a_system():
    ours = {"Language model" if name == "Llama2" else name for name in paper.printed_results()["system"]}
    assert ours - set(systems.SYSTEMS) == set()


def test_a_name_or_seed_given_twice_is_one_cell(home):
    twice = table_runner.cells(["world", "world"], ["SASRec", "SASRec"], [1, 0, 1], 2, "", SETTINGS)
    assert [cell.seed for cell in twice] == [1, 0]


def test_cells_have_the_same_questions_and_can_be_loaded(home):
    cells = some()
    assert table_runner.run_all(cells) == []
    table_runner.publish(cells, home / "published")
    results = table_results.load_table(home / "published")
    for windows, n, draws in (("last", 6, 2), ("all", 12, 1)):
        outcomes = table_results.outcomes_by_system(results, "world", windows)
        assert list(outcomes) == SMALL  # in the table's order
        for system in outcomes.values():
            assert system.hit.shape == system.valid.shape == (1, draws, n) and system.users.shape == (n,)
            assert system.questions == outcomes["Popularity"].questions and len(set(system.questions)) == draws
            assert not (system.hit & ~system.valid).any()
        assert outcomes["Popularity"].valid.all()
    summary = table_results.system_means(table_results.outcomes_by_system(results, "world"))
    assert list(summary.index) == SMALL
    assert set(summary["n"]) == {6}
    compared = table_results.compare_systems(table_results.outcomes_by_system(results, "world"))
    assert list(compared.index) == SMALL[:2]
    np.testing.assert_allclose(compared["p_holm"], comparisons.holm(compared["p"]))
    assert table_results.verdict({"world": compared}, "iLoRA", SMALL[0]).startswith("iLoRA is ")
    json.dumps(without_nan({"a": compared.to_dict("index")}), allow_nan=False)


def test_a_shuffled_history_has_the_same_items_in_another_order(home):
    questions = data.questions(data.load("world", users=200, seed=0), "test")
    before, after = questions.sequences.history, table_runner.shuffled_histories(questions)
    assert ((before == questions.n_items) == (after == questions.n_items)).all()  # padding stays on the left
    assert (np.sort(before) == np.sort(after)).all() and (before != after).any(1).mean() > 0.8
    assert (after == table_runner.shuffled_histories(questions)).all()


def test_trained_systems_are_also_evaluated_on_shuffled_histories(home, monkeypatch):
    monkeypatch.setitem(recommenders.EPOCHS, "SASRec", 1)
    results = {}
    for cell in some(("Popularity", "SASRec")):
        cell.run()
        results[cell.system] = json.loads(cell.result.read_bytes())
    assert "shuffled" not in results["Popularity"]["metrics"]
    outcomes = results["SASRec"]["outcomes"]
    assert outcomes["shuffled questions"] == outcomes["all questions"]
    assert outcomes["shuffled hit"] != outcomes["all hit"]


def test_variants_of_ilora_are_no_rows_of_the_table_and_differ_in_their_gates(monkeypatch):
    adapters = []

    def tune(dataset, items, adapter, *rest, **sizes):
        adapters.append(adapter)
        return types.SimpleNamespace(), pd.DataFrame({"hit_ratio": [0.5]}), []

    monkeypatch.setattr(systems, "trained", lambda *arguments: "encoder")
    monkeypatch.setattr(systems.tuning, "tune", tune)
    variants = [name for name in systems.SYSTEMS if name.startswith("iLoRA")]
    for name in variants:
        systems.SYSTEMS[name].make(None, 0, systems.SETTINGS)
    assert len(set(adapters)) == len(variants) == 1 + len(systems.VARIANTS)
    assert {adapter.experts for adapter in adapters} == {2, 4, 8}
    assert [name for name in systems.TABLE if name in variants] == ["iLoRA"]


def test_popularity_is_right_where_a_loop_is(home):
    (cell,) = some(["Popularity"], draws=3, users=400)
    table_runner.run_all([cell])
    source = data.load("world", users=400, seed=0)
    questions = data.questions(source, "test", windows="last")
    counts, right = Popularity.from_dataset(source).counts.numpy(), []
    for draw in range(3):
        questions.set_epoch(draw)
        best = [offered[counts[offered].argmax()] for _, offered, _ in questions]
        right.append("".join("01"[int(item == row[2])] for item, row in zip(best, questions, strict=True)))
    assert len(set(right)) == 3  # other candidates, other outcomes
    result = json.loads(cell.result.read_text())
    assert result["outcomes"]["last hit"] == right
    assert result["metrics"]["last"]["hit_ratio"] == "".join(right).count("1") / len("".join(right))


def test_a_sample_is_rows_of_the_questions_of_all_systems(home, monkeypatch):
    """ChatRec's cell with another system in it, whose outcomes on all questions are known."""
    likes = systems.SYSTEMS["Popularity"].make
    sampled = systems.System(likes, ("chat_limit",), seeds=False, sample="chat_limit")
    monkeypatch.setitem(systems.SYSTEMS, "ChatRec", sampled)
    cells = some(["Popularity", "ChatRec", "iLoRA"], seeds=(0, 1), test_limit=0, chat_limit=4)[:3]
    assert [cell.system for cell in cells] == ["Popularity", "Popularity", "ChatRec"]  # a world for each seed
    cells = [cells[0], cells[2], some(["iLoRA"], test_limit=0)[0]]
    assert table_runner.run_all(cells) == []
    results = [json.loads(cell.result.read_text()) for cell in cells]
    source = data.load("world", users=60, seed=0)
    for windows in ("last", "all"):
        whole, part, ours = table_results.outcomes_by_system(results, "world", windows).values()
        rows = results[1]["outcomes"][f"{windows} rows"]
        assert rows == sorted({*rows}) and len(rows) == 4 < len(whole.users)
        assert part.rows.tolist() == rows and part.hit.shape[-1] == part.valid.shape[-1] == 4
        assert part.questions == whole.questions
        np.testing.assert_array_equal(part.hit, whole.hit[..., rows])
        user = data.sequences(source, "test", windows=windows).user
        assert [user[row] for row in rows] == [np.unique(user)[place] for place in part.users]
        compared = table_results.compare_systems({"ChatRec": part, "iLoRA": ours})
        difference = ours.hit[..., rows].astype(float) - part.hit
        assert compared.loc["ChatRec", ["n", "value"]].tolist() == [4, pytest.approx(difference.mean())]
        assert compared.loc["ChatRec", "users"] == len({*part.users})
        assert table_results.compare_systems({"ChatRec": part, "iLoRA": ours}, "ChatRec").loc["iLoRA", "n"] == 4
    assert table_results.system_means({"ChatRec": part}).loc["ChatRec", "n"] == 4
    assert some(["ChatRec"], chat_limit=5)[0].result != cells[1].result


def test_a_sample_that_is_larger_than_the_questions_is_all_of_them(home):
    source = data.load("world", users=60, seed=0)
    questions = data.questions(source, "test", windows="last")
    system = Popularity.from_dataset(source)
    every, most = (table_runner.outcome_strings(system, questions, 2, 16, sample) for sample in (0, 1000))
    assert most.pop("rows") == list(range(len(questions)))
    assert most == every


def test_the_results_of_the_book_have_the_parameters_of_their_cells():
    assert "sample" not in some(["iLoRA"])[0].parameters
    book = Path(__file__).parents[1] / "book" / "results" / "table"
    for path in book.rglob("table-*.json"):
        was = json.loads(path.read_text())["parameters"]
        settings = systems.SETTINGS | {name: value for name, value in was.items() if name in systems.SETTINGS}
        cell = table_runner.Cell(was["system"], was["dataset"], was["seed"], was["draws"], "", settings)
        assert {name: value for name, value in was.items() if name not in systems.ROUNDING_ONLY} == cell.parameters


def test_existing_results_are_not_run_again_and_settings_of_others_change_nothing(home, monkeypatch):
    cells = some(["Popularity"])
    table_runner.run_all(cells)
    monkeypatch.setattr(table_runner.Cell, "run", lambda cell: pytest.fail(f"{cell} was run again"))
    assert table_runner.run_all(some(["Popularity"], rank=16, learning_rate=1.0)) == []
    assert some(["iLoRA"])[0].result != some(["iLoRA"], rank=16)[0].result
    assert some(["Popularity"])[0].result != some(["Popularity"], draws=3)[0].result


def test_a_cell_that_fails_is_kept_as_failed_until_it_succeeds(home, monkeypatch):
    def broken(dataset, seed, settings):
        raise RuntimeError("no memory\nfor this")

    kept = systems.SYSTEMS["Popularity"]
    monkeypatch.setitem(systems.SYSTEMS, "Popularity", systems.System(broken, seeds=False))
    cells = some(["Popularity", "Language model"])
    ((failed, reason),) = table_runner.run_all(cells)
    assert failed.system == "Popularity" and reason == "RuntimeError: no memory"
    table_runner.publish(cells, home / "published")
    shown = {run["parameters"]["system"]: run.get("error") for run in table_results.load_table(home / "published")}
    assert shown == {"Popularity": "RuntimeError: no memory", "Language model": None}
    assert list(table_results.outcomes_by_system(table_results.load_table(home / "published"), "world")) == [
        "Language model"
    ]
    monkeypatch.setitem(systems.SYSTEMS, "Popularity", kept)
    assert table_runner.run_all(cells) == []
    table_runner.publish(cells, home / "published")
    assert not [run for run in table_results.load_table(home / "published") if "error" in run]


def test_several_processes_stop_in_time_resume_when_started_again_and_give_the_same_outcomes(home):
    cells = some(["Popularity", "Language model"], seeds=(0, 1))
    assert len(cells) == 4
    began = time.monotonic()
    assert table_runner.run_all(cells, jobs=2, minutes=1e-3) == []
    assert time.monotonic() - began < 30 and not any(cell.result.is_file() or cell.failure.is_file() for cell in cells)
    assert table_runner.run_all(cells, jobs=2, minutes=9) == []
    together = [json.loads(cell.result.read_text())["outcomes"] for cell in cells]
    for cell in cells:
        cell.result.unlink()
    table_runner.run_all(cells)
    assert together == [json.loads(cell.result.read_text())["outcomes"] for cell in cells]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 4, ["0", "1", "2", "3", "0"]), ("5,2", 2, ["5", "2", "5", "2", "5"]), (None, 1, [None] * 5),
     (None, 0, [None] * 5), ("3", 1, [None] * 5), ("GPU-1,GPU-2", 2, ["GPU-1", "GPU-2", "GPU-1", "GPU-2", "GPU-1"])],
)  # fmt: skip
def test_processes_are_distributed_over_the_gpus(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert [runner.gpu(number).get("CUDA_VISIBLE_DEVICES") for number in range(5)] == expected


# ---------------------------------------------------------------- the search for L2


def test_the_choice_of_dropout_and_l2_is_a_result_made_from_existing_models(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    monkeypatch.setitem(recommenders.EPOCHS, "GRU4Rec", 1)
    command = ["--systems", "Popularity", "GRU4Rec", "--seeds", "0", "--draws", "1", "--to", str(tmp_path / "to")]
    few = [text for name in ("users", "test_limit", "device") for text in ("-p", name, str(FEW[name]))]
    assert main(["table", *command, *few]) == 0
    (path,) = (tmp_path / "to").glob("regularisation-*.json")
    result = json.loads(path.read_text())
    source = data.load("world", users=60, seed=0)
    monkeypatch.setattr(training, "fit", None)  # nothing is trained again
    chosen, trials = recommenders.choose_regularisation(source, "GRU4Rec", device="cpu")
    grid = pd.DataFrame(result["metrics"]["grid"])
    assert result["metrics"]["chosen"] == chosen and chosen in recommenders.GRID
    np.testing.assert_allclose(grid[["dropout", "l2", "value", "epoch"]], trials, atol=1e-6)
    assert (grid["low"] < grid["value"]).all() and (grid["value"] < grid["high"]).all()
    assert set(grid["n"]) == {len(data.sequences(source, "validation"))}
    assert result["parameters"]["grid"] == list(recommenders.GRID)
    monkeypatch.setattr(table_runner, "choose_regularisation", lambda *_, **__: pytest.fail("searched again"))
    assert main(["table", *command, *few]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--systems", "SASrec"], "there is no 'SASrec' here: choose among Popularity"),
        (["--datasets", "movilens"], "there is no 'movilens' here: choose among world"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--seeds", "-1"], "whole numbers from 0 on"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--minutes", "-1"], "--minutes 0 or more"),
        (["--minutes", "nan"], "--minutes 0 or more"),
        (["-p", "guidance", "random"], "a table has no parameter 'guidance'"),
        (["-p", "rank", "six"], "parameter 'rank' must be a whole number"),
    ],
)
def test_a_wrong_command_ends_in_one_sentence(home, capsys, arguments, sentence):
    assert main(["table", *arguments]) == 1
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("ilora: ") and sentence in printed and "\n" not in printed
