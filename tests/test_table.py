"""Cells on the small world, run for real: asked alike, resumed, failed and shown as failed, read as a table."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ilora import data, paper, runs, table, traditional, uncertainty, verdicts
from ilora.recommenders import Popularity

FEW = {"users": 60, "test_limit": 12, "train_limit": 16, "base_model": "embedded", "device": "cpu"}
SETTINGS = table.SETTINGS | FEW
SMALL = ["Popularity", "Language model", "iLoRA"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    monkeypatch.setattr(table, "trained", lambda dataset, kind, seed, settings: encoder(dataset))
    return tmp_path


def encoder(dataset):
    """An untrained SASRec: what is tested here is the table, not the recommenders."""
    from ilora.recommenders import SASRec

    return SASRec(len(dataset.items)).eval()


def some(systems=SMALL, seeds=(0,), draws=2, **settings):
    return table.cells(["world"], systems, list(seeds), draws, "", SETTINGS | settings)


def test_every_row_of_the_paper_is_a_system():
    ours = {"Language model" if name == "Llama2" else name for name in paper.table()["system"]}
    assert ours - set(table.SYSTEMS) == set()


def test_cells_are_asked_the_same_questions_and_can_be_read(home):
    cells = some()
    assert table.run_all(cells) == []
    table.publish(cells, home / "published")
    results = verdicts.read(home / "published")
    for windows, n, draws in (("last", 6, 2), ("all", 12, 1)):
        found = verdicts.answers(results, "world", windows)
        assert list(found) == SMALL  # in the table's order
        for own in found.values():
            assert own.hit.shape == own.valid.shape == (1, draws, n) and own.users.shape == (n,)
            assert own.questions == found["Popularity"].questions and len(set(own.questions)) == draws
            assert not (own.hit & ~own.valid).any()
        assert found["Popularity"].valid.all()
    summary = verdicts.summary(verdicts.answers(results, "world"))
    assert list(summary.index) == SMALL
    assert set(summary["n"]) == {6}
    compared = verdicts.comparisons(verdicts.answers(results, "world"))
    assert list(compared.index) == SMALL[:2]
    np.testing.assert_allclose(compared["p_holm"], uncertainty.holm(compared["p"]))
    text = verdicts.readable({"world": summary}, paper.table().set_index(["dataset", "system"])["hit_ratio"])
    assert text.loc[("world", "iLoRA"), "paper"] == "-"
    assert verdicts.provenance(results).loc[("world", "iLoRA"), "seeds"] == 1
    assert verdicts.verdicts({"world": compared}).name == "iLoRA"
    json.dumps(verdicts.plain({"a": compared.to_dict("index")}), allow_nan=False)


def test_popularity_is_right_where_a_loop_says_so(home):
    (cell,) = some(["Popularity"], draws=3, users=400)
    table.run_all([cell])
    source = data.load("world", users=400, seed=0)
    asked = table.pipeline.questions(source, "test", windows="last")
    counts, right = Popularity.from_dataset(source).counts.numpy(), []
    for draw in range(3):
        asked.set_epoch(draw)
        best = [offered[counts[offered].argmax()] for _, offered, _ in asked]
        right.append("".join("01"[int(item == row[2])] for item, row in zip(best, asked, strict=True)))
    assert len(set(right)) == 3  # other candidates, other answers
    result = json.loads(cell.result.read_text())
    assert result["outcomes"]["last hit"] == right
    assert result["metrics"]["last"]["hit_ratio"] == "".join(right).count("1") / len("".join(right))


def test_a_sample_is_rows_of_the_questions_that_all_are_asked(home, monkeypatch):
    """ChatRec's cell with another system in it, whose answers to all questions are known."""
    likes = table.SYSTEMS["Popularity"].make
    sampled = table.System(likes, ("chat_limit",), seeds=False, sample="chat_limit")
    monkeypatch.setitem(table.SYSTEMS, "ChatRec", sampled)
    cells = some(["Popularity", "ChatRec", "iLoRA"], seeds=(0, 1), test_limit=0, chat_limit=4)[:3]
    assert [cell.system for cell in cells] == ["Popularity", "Popularity", "ChatRec"]  # a world for each seed
    cells = [cells[0], cells[2], some(["iLoRA"], test_limit=0)[0]]
    assert table.run_all(cells) == []
    results = [json.loads(cell.result.read_text()) for cell in cells]
    source = data.load("world", users=60, seed=0)
    for windows in ("last", "all"):
        whole, part, ours = verdicts.answers(results, "world", windows).values()
        rows = results[1]["outcomes"][f"{windows} rows"]
        assert rows == sorted({*rows}) and len(rows) == 4 < len(whole.users)
        assert part.rows.tolist() == rows and part.hit.shape[-1] == part.valid.shape[-1] == 4
        assert part.questions == whole.questions
        np.testing.assert_array_equal(part.hit, whole.hit[..., rows])
        user = data.sequences(source, "test", windows=windows).user
        assert [user[row] for row in rows] == [np.unique(user)[own] for own in part.users]
        compared = verdicts.comparisons({"ChatRec": part, "iLoRA": ours})
        difference = ours.hit[..., rows].astype(float) - part.hit
        assert compared.loc["ChatRec", ["n", "value"]].tolist() == [4, pytest.approx(difference.mean())]
        assert compared.loc["ChatRec", "users"] == len({*part.users})
        assert verdicts.comparisons({"ChatRec": part, "iLoRA": ours}, "ChatRec").loc["iLoRA", "n"] == 4
    assert verdicts.summary({"ChatRec": part}).loc["ChatRec", "n"] == 4
    assert some(["ChatRec"], chat_limit=5)[0].result != cells[1].result


def test_a_sample_that_is_larger_than_the_questions_is_all_of_them(home):
    source = data.load("world", users=60, seed=0)
    asked = table.pipeline.questions(source, "test", windows="last")
    own = Popularity.from_dataset(source)
    every, most = (table._answers(own, asked, 2, 16, sample) for sample in (0, 1000))
    assert most.pop("rows") == list(range(len(asked)))
    assert most == every


def test_the_results_of_the_book_are_still_those_of_their_cells():
    assert "sample" not in some(["iLoRA"])[0].parameters
    book = Path(__file__).parents[1] / "book" / "results" / "table"
    for path in book.rglob("table-*.json"):
        was = json.loads(path.read_text())["parameters"]
        settings = table.SETTINGS | {name: value for name, value in was.items() if name in table.SETTINGS}
        cell = table.Cell(was["system"], was["dataset"], was["seed"], was["draws"], "", settings)
        assert path.name in (cell.result.name, cell.failure.name)


def test_what_is_there_is_not_run_again_and_settings_of_others_change_nothing(home, monkeypatch):
    cells = some(["Popularity"])
    table.run_all(cells)
    monkeypatch.setattr(table, "run", lambda cell: pytest.fail(f"{cell} was run again"))
    assert table.run_all(some(["Popularity"], rank=16, learning_rate=1.0)) == []
    assert some(["iLoRA"])[0].result != some(["iLoRA"], rank=16)[0].result
    assert some(["Popularity"])[0].result != some(["Popularity"], draws=3)[0].result


def test_a_cell_that_fails_is_kept_as_failed_until_it_succeeds(home, monkeypatch):
    def broken(dataset, seed, settings):
        raise RuntimeError("no memory\nfor this")

    kept = table.SYSTEMS["Popularity"]
    monkeypatch.setitem(table.SYSTEMS, "Popularity", table.System(broken, seeds=False))
    cells = some(["Popularity", "Language model"])
    ((failed, reason),) = table.run_all(cells)
    assert failed.system == "Popularity" and reason == "RuntimeError: no memory"
    table.publish(cells, home / "published")
    shown = verdicts.failures(verdicts.read(home / "published"))
    assert shown[["system", "reason"]].values.tolist() == [["Popularity", "RuntimeError: no memory"]]
    assert list(verdicts.answers(verdicts.read(home / "published"), "world")) == ["Language model"]
    monkeypatch.setitem(table.SYSTEMS, "Popularity", kept)
    assert table.run_all(cells) == []
    table.publish(cells, home / "published")
    assert verdicts.failures(verdicts.read(home / "published")).empty


def test_several_processes_give_the_same_answers(home):
    cells = some(["Popularity", "Language model"], seeds=(0, 1))
    assert len(cells) == 4
    assert table.run_all(cells, jobs=2) == []
    together = [json.loads(cell.result.read_text())["outcomes"] for cell in cells]
    for cell in cells:
        cell.result.unlink()
    table.run_all(cells)
    assert together == [json.loads(cell.result.read_text())["outcomes"] for cell in cells]


def test_a_table_stops_in_time_and_goes_on_when_started_again(home):
    cells = some(["Popularity", "Language model"], seeds=(0, 1))
    began = time.monotonic()
    assert table.run_all(cells, jobs=2, minutes=1e-3) == []
    assert time.monotonic() - began < 30 and not any(cell.result.is_file() or cell.failure.is_file() for cell in cells)
    assert table.run_all(cells, jobs=1, minutes=9) == []
    assert all(cell.result.is_file() for cell in cells)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 4, ["0", "1", "2", "3", "0"]), ("5,2", 2, ["5", "2", "5", "2", "5"]), (None, 1, [None] * 5),
     (None, 0, [None] * 5), ("3", 1, [None] * 5), ("GPU-1,GPU-2", 2, ["GPU-1", "GPU-2", "GPU-1", "GPU-2", "GPU-1"])],
)  # fmt: skip
def test_processes_share_out_the_gpus(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert [table._environment(number).get("CUDA_VISIBLE_DEVICES") for number in range(5)] == expected


# ---------------------------------------------------------------- the search for L2


def test_how_l2_was_chosen_is_a_result_made_of_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    monkeypatch.setattr(traditional, "EPOCHS", dict.fromkeys(traditional.EPOCHS, 1))
    command = ["--systems", "Popularity", "GRU4Rec", "--seeds", "0", "--draws", "1", "--to", str(tmp_path / "to")]
    few = [text for name in ("users", "test_limit", "device") for text in ("-p", name, str(FEW[name]))]
    assert table.main([*command, *few]) == 0
    (path,) = (tmp_path / "to").glob("l2-*.json")
    result = json.loads(path.read_text())
    source = data.load("world", users=60, seed=0)
    monkeypatch.setattr(traditional, "fit", None)  # nothing is trained again
    chosen, found = traditional.choose_l2(source, "GRU4Rec", device="cpu")
    grid = pd.DataFrame(result["metrics"]["grid"])
    assert result["metrics"]["chosen"] == chosen and set(found["l2"]) == set(traditional.L2_GRID)
    np.testing.assert_allclose(grid[["l2", "value", "epoch"]], found, atol=1e-6)
    assert (grid["low"] < grid["value"]).all() and (grid["value"] < grid["high"]).all()
    assert set(grid["n"]) == {len(data.sequences(source, "validation"))}
    assert result["parameters"]["grid"] == list(traditional.L2_GRID)
    monkeypatch.setattr(table, "search", lambda cell: pytest.fail("searched again"))
    assert table.main([*command, *few]) == 0


def test_a_chosen_l2_at_the_end_of_its_grid_is_said_to_be_there(tmp_path):
    for number, (chosen, system) in enumerate([(1e-4, "SASRec"), (1e-5, "Caser"), (0.0, "GRU4Rec")]):
        own = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 10}
        grid = [own | {"l2": l2, "epoch": 1} for l2 in (0.0, 1e-5, 1e-4)]
        about = {"dataset": "movielens", "system": system}
        runs.write_json(
            tmp_path / f"l2-{number}.json", {"parameters": about, "metrics": {"chosen": chosen, "grid": grid}}
        )
    shown = verdicts.searches(tmp_path)
    assert shown["system"].tolist() == ["GRU4Rec", "Caser", "SASRec"]  # in the table's order
    assert shown["at_edge"].tolist() == [False, False, True] and shown["chosen"].tolist() == ["0", "1e-05", "0.0001"]
    assert shown["L2 1e-05"].str.replace("\N{NO-BREAK SPACE}", " ").tolist() == ["0.250 [0.200, 0.300]"] * 3
    assert verdicts.searches(tmp_path / "none").empty


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
    assert table.main(arguments) == 1
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("ilora: ") and sentence in printed and "\n" not in printed


def test_mixed_settings_are_refused_and_other_questions_not_compared():
    def result(system, seed, questions, **settings):
        part = {"last hit": ["01"], "last valid": ["11"], "last questions": [questions], "last windows": [1, 1]}
        about = {"system": system, "dataset": "movielens", "seed": seed, "draws": 1, **settings}
        return {"parameters": about, "outcomes": part}

    same = [result("iLoRA", 0, "a"), result("iLoRA", 1, "a"), result("Popularity", 0, "a")]
    assert verdicts.answers(same, "movielens")["iLoRA"].hit.tolist() == [[[False, True]], [[False, True]]]
    with pytest.raises(runs.UserError, match="several settings"):
        verdicts.answers([result("iLoRA", 0, "a", rank=8), result("iLoRA", 1, "a", rank=16)], "movielens")
    with pytest.raises(runs.UserError, match="different questions"):
        verdicts.answers([result("iLoRA", 0, "a"), result("iLoRA", 1, "b")], "movielens")
    found = verdicts.answers([*same, result("SASRec", 0, "b"), result("GRU4Rec", 2, "a")], "movielens")
    assert list(verdicts.comparisons(found).index) == ["Popularity"]  # others: other questions, and no seed in common
    assert verdicts.comparisons({"iLoRA": found["iLoRA"]}).empty


def test_runs_are_paired_by_their_seed():
    hit = np.array([[[0, 0, 1, 1]], [[1, 1, 0, 0]], [[0, 1, 0, 1]]], bool)
    ours = verdicts.Answers((0, 1, 2), hit, hit, np.arange(4), ("a",), np.arange(4))
    theirs = verdicts.Answers((1, 2), hit[1:], hit[1:], np.arange(4), ("a",), np.arange(4))  # seed 0 failed
    row = verdicts.comparisons({"iLoRA": ours, "LLaRA": theirs}).loc["LLaRA"]
    assert row["value"] == row["low"] == row["high"] == 0


def test_a_larger_base_is_compared_with_the_same_seeds_of_the_small_one():
    def of(seeds, share, questions="a"):
        hit = np.random.default_rng(share).random((len(seeds), 1, 40)) < share / 10
        return verdicts.Answers(seeds, hit, hit, np.arange(40), (questions,), np.arange(40))

    large = {"iLoRA": of((1, 2), 8), "LLaRA": of((0,), 5), "TALLRec": of((0,), 5, "b"), "Language model": of((0,), 4)}
    small = {"iLoRA": of((0, 1, 2), 3), "LLaRA": of((2,), 5), "TALLRec": of((0,), 5), "SASRec": of((0,), 9)}
    found = verdicts.gained(large, small)
    assert list(found.index) == ["iLoRA"]  # others: no seed in common, other questions, or over one base alone
    expected = uncertainty.compare(large["iLoRA"].hit, small["iLoRA"].hit[1:], np.arange(40))
    assert found.loc["iLoRA", [*expected]].to_dict() == expected and expected["value"] > 0.2
    assert verdicts.gained(large, {}).empty and verdicts.gained({}, small).empty


def test_a_sample_is_compared_on_its_rows_alone():
    rng, users, rows = np.random.default_rng(0), np.repeat(np.arange(10), 3), np.array([1, 2, 5, 17, 18, 29])
    ours, theirs = rng.random((3, 2, 30)) < 0.6, rng.random((1, 2, 30)) < 0.3
    whole = verdicts.Answers((0, 1, 2), ours, ours, users, ("a", "b"), np.arange(30))
    part = verdicts.Answers((0,), theirs[..., rows], theirs[..., rows], users[rows], ("a", "b"), rows)
    row = verdicts.comparisons({"iLoRA": whole, "ChatRec": part}).loc["ChatRec"]
    expected = uncertainty.compare(ours[..., rows], theirs[..., rows], users[rows])
    assert {name: row[name] for name in expected} == expected
    assert (row["n"], row["users"]) == (6, 5)
    back = verdicts.comparisons({"iLoRA": whole, "ChatRec": part}, "ChatRec").loc["iLoRA"]
    assert back["value"] == pytest.approx(-row["value"]) and back["n"] == 6
    none = verdicts.Answers((0,), theirs[..., :0], theirs[..., :0], users[:0], ("a", "b"), rows[:0])
    assert verdicts.comparisons({"iLoRA": whole, "ChatRec": none}).empty


def test_hits_of_valid_answers_are_the_ratio_of_sums():
    hit, valid = np.array([[[1, 0, 1, 0]]], bool), np.array([[[1, 1, 1, 0]]], bool)
    found = {"iLoRA": verdicts.Answers((0,), hit, valid, np.arange(4), ("a",), np.arange(4))}
    row = verdicts.summary(found).loc["iLoRA"]
    assert (row["value"], row["hit_ratio_of_valid"], row["valid_ratio"]) == (0.5, pytest.approx(2 / 3), 0.75)
    assert isinstance(verdicts.summary(found), pd.DataFrame)


def test_a_difference_needs_its_test_and_its_interval():
    rows = {"A": (0.01, 0.1, 0.2), "B": (0.01, -0.1, 0.2), "C": (0.2, 0.1, 0.2), "D": (0.01, -0.2, -0.1)}
    compared = pd.DataFrame.from_dict(rows, orient="index", columns=["p_holm", "low", "high"])
    compared["value"] = compared[["low", "high"]].mean(axis=1)
    assert verdicts.verdicts({"x": compared})["x"] == "above A; below D; not told apart from B, C"


def test_what_a_folder_lacks_is_said_in_a_sentence():
    every = pd.DataFrame(index=list(table.SYSTEMS))
    assert verdicts.missing({"LastFM": every}, ["LastFM"]) == "There are results of every system on LastFM."
    said = verdicts.missing({"LastFM": every.drop(["Caser", "iLoRA"])}, ["LastFM", "Steam"])
    assert said == "There are no results of LastFM (Caser, iLoRA); Steam (any system)."


def test_answers_that_are_all_wrong_still_have_an_interval():
    wrong = np.zeros((1, 5, 50), bool)
    own = verdicts.Answers((0,), wrong, wrong, np.arange(50), ("a",) * 5, np.arange(50))
    row = verdicts.summary({"ChatRec": own}).loc["ChatRec"]
    assert row["value"] == 0 == row["low"] and 0.05 < row["high"] < 0.1  # Wilson's of 0 among 50
