"""The benchmarks at tiny sizes: the ways give equal results, and the written files are complete."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ilora.language import NO_LABEL
from ilora.study import benchmark_results

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import adapter as benchmark
import gradients
import language
import measure
import padding
import recommender
import world

pytestmark = pytest.mark.book

WHOLE = {"name", "parameters", "metrics", "seconds", "peak_memory_mib", "device", "versions", "commit", "date"}
SMALL = ["--shape", "smoke", "--device", "cpu", "--rounds", "2", "--rows", "2", "--tokens", "12", "--answer", "3"]
SMALL += ["--more-rows", "3"]


def run(script, folder, **options):
    """Run a benchmark and return the metrics it writes."""
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    script.main([*flags, "--device", "cpu", "--out", str(folder / f"{script.__name__}_cpu.json")])
    result = benchmark_results.load_benchmarks(folder)[f"{script.__name__}_cpu"]
    assert result.keys() >= WHOLE
    assert result["parameters"].items() >= {"device": "cpu", **options}.items()
    return result["metrics"]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILORA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


# ---------------------------------------------------------------- the harness


def test_ways_take_turns_and_ratios_are_taken_within_a_round(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    ways = {name: lambda name=name: calls.append(name) or name.upper() for name in "abc"}
    seconds, results = measure.take_turns(ways, 3, torch.device("cpu"))
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert seconds == {name: [1, 1, 1] for name in "abc"} and results == {"a": "A", "b": "B", "c": "C"}
    ratios = measure.ratios({"first": [1.0, 2.0, 4.0], "second": [3.0, 4.0, 8.0]})  # 3, 2 and 2 times
    assert ratios["second"]["time_ratio"] == {"median": 2, "low": 2, "high": 2.5}
    assert ratios["first"]["seconds"] == {"median": 2, "low": 1.5, "high": 3}


def test_a_goal_without_its_way_is_ignored():
    measured, _ = measure.compare(
        {"a": int, "b": int}, 1, torch.device("cpu"), {"b": {"at_least": 2}, "c": {"at_most": 1}}
    )
    assert measured["b"]["at_least"] == 2 and measured.keys() == {"a", "b", "rounds", "to"}


# ---------------------------------------------------------------- each script


@pytest.fixture(scope="module")
def bench():
    options = dict.fromkeys(("examples", "questions", "clients"), 4)
    names = argparse.Namespace(dataset="world", data_dir="", users=120, device="cpu", batch_size=3, **options)
    names.base_model, names.micro_batch_size = "embedded", 2
    return language.Bench(names)


def test_language(tmp_path):
    sizes = {"users": 120, "examples": 3, "questions": 3, "clients": 3, "batch_size": 2, "rounds": 1}
    metrics = run(language, tmp_path, **sizes)
    assert metrics.keys() == language.PARTS.keys()
    assert metrics["prompts"]["agreement"] == {"equal ids": True}
    assert metrics["answers"]["agreement"]["equal answers"] == 1
    assert metrics["answers"]["agreement"]["valid answers"] > 0
    assert metrics["evaluation"]["agreement"] == {"equal answers": 1, "equal ranks": 1}
    for part in ("ranking", "serving", "next token"):
        assert metrics[part]["agreement"]["largest difference"] < 1e-4
    for part, goals in language.GOALS.items():
        assert all(metrics[part][way]["at_least"] == goal["at_least"] for way, goal in goals.items())


def test_training_from_text_has_the_loss_of_fit(bench):
    rows = [bench.train[row] for row in range(3)]
    usual, ours = language.collate_text(bench.model, rows), bench.model.collate(rows)
    assert usual.keys() <= ours.keys()
    assert (usual["labels"] != NO_LABEL).sum() == (ours["labels"] != NO_LABEL).sum() > 0
    torch.testing.assert_close(language.full_loss(bench.model, usual, hybrid=True), bench.model(ours))


def test_both_trainings_change_the_adapter(bench):
    weight = next(value for name, value in bench.model.named_parameters() if "lora_A" in name)
    for train in (language.train_by_fit, language.train_by_trainer):
        before = weight.detach().clone()
        train(bench.model, bench.train, 3)
        assert not torch.equal(before, weight) and not bench.model.training


def test_predictions_depend_on_the_adapter_of_the_user(bench):
    """Otherwise the ways of serving could agree although they ignore the user."""
    inputs, z = language.prompts_of(bench.model, bench.clients)
    right, wrong = (language.next_logits(bench.model, inputs, guidance) for guidance in (z, z.roll(1, 0) + 1))
    assert (right - wrong).abs().max() / right.std() > 1e-3
    before = [parameter.clone() for parameter in bench.model.parameters()]
    language.serve_merged(bench.model, [language.prompts_of(bench.model, [row])[0] for row in bench.clients], z)
    torch.testing.assert_close(list(bench.model.parameters()), before)  # merged, then removed again


def test_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("ilora.study.gradients.clusters", lambda z: (np.arange(len(z)) % 3, None))
    metrics = run(gradients, tmp_path, users=120, sequences=12, batch_size=2, rounds=1)
    measured = metrics["gradients"]
    assert measured.keys() >= {"clusters", "usual loop", "loop", "pass"}
    assert measured["agreement"]["largest difference"] < 1e-4
    assert metrics["clustering"]["rows"] == 480


def test_recommender(tmp_path, monkeypatch):
    """With a fake RecBole that is right about every window, because the tests have no RecBole."""
    (tmp_path / "recbole").mkdir()
    received = []

    def train_recbole(folder, windows, kind, epochs, seed):
        received.append(windows)
        test = np.ones(len(windows["test_target"]))
        return {"validation": np.full(epochs, 0.5), "test": test, "seconds": np.arange(1.0, epochs + 1)}

    monkeypatch.setattr(recommender, "train_recbole", train_recbole)
    options = {"dataset": "world", "users": 120, "epochs": 2, "seeds": 2, "kind": "GRU4Rec", "recbole_epochs": 3}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    recommender.main([*flags, "--recbole", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out.json")])
    metrics = json.loads((tmp_path / "out.json").read_text())["metrics"]["GRU4Rec"]
    every_target = 96 * 19  # all events of the training users but the first of each
    assert [len(windows["train_target"]) for windows in received] == [every_target] * 2
    assert metrics["RecBole"]["seconds"] == [3, 3] and np.shape(metrics["ilora"]["validation"]) == (2, 2)
    ours, difference = metrics["ilora"]["test"], metrics["difference"]
    assert 0 < ours["value"] < 1 and ours["n"] == len(received[0]["test_target"])
    assert difference["value"] == pytest.approx(ours["value"] - 1) and difference["high"] < 0


def test_recommender_needs_the_folder_of_recbole(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recommender.main(["--recbole", str(tmp_path), "--dataset", "world"])
    assert "has no RecBole: run the first command" in capsys.readouterr().err


def test_world(tmp_path):
    metrics = run(world, tmp_path, users=50, events=12)["world"]
    assert metrics["events"] == 600 and metrics["windows"] == 50 * 9 and metrics["candidates"] == 50 * 9 * 20
    assert metrics["seconds"]["value"] == pytest.approx(sum(metrics["parts"].values()))
    assert (metrics["seconds"]["at_most"], metrics["peak_gib"]["at_most"]) == (120, 6)
    assert 0 < metrics["peak_gib"]["value"] < 20


def test_padding(tmp_path):
    length = np.array([4, 1, 3, 2])
    assert padding.share(length, 2, 2) == pytest.approx(1 - 10 / (2 * 4 + 2 * 3))
    assert padding.share(length, 4, 2) == pytest.approx(1 - 10 / (2 * 2 + 2 * 4))
    options = {"dataset": "world", "users": 120, "examples": 100, "batch_size": 16, "micro_batch_size": 4}
    share = run(padding, tmp_path, **options)["padding"]["share"]
    assert share["as they come"] > share["training"] > share["evaluation"] >= 0


# ---------------------------------------------------------------- the adapter


def test_every_part_is_measured_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda passes, *_, **__: passes)  # what a CPU can record
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    parts = [part for part in benchmark.PARTS if part != "largest batch"]
    benchmark.main([*SMALL, "--out", str(tmp_path / "result.json"), "--parts", *parts])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= WHOLE
    assert result["parameters"] == {
        "device": "cpu", "rounds": 2, "rows": 2, "more_rows": 3, "tokens": 12, "answer": 3, "shape": "smoke"
    }  # fmt: skip
    metrics = result["metrics"]
    assert set(metrics) == {"matmul", *parts}
    assert {part: metrics[part]["rows"] for part in parts if metrics[part]["rows"] != 2} == {
        "experts": 1, "adapter, more rows": 3, "compile, more rows": 3,
    }  # fmt: skip
    assert metrics["compile"]["iLoRA, compiled"]["at_most"] == 1.02
    printed = capsys.readouterr().out
    for part in parts:
        first, *others = benchmark.PARTS[part]
        for variant in (first, *others):
            measured = metrics[part][variant]
            assert 0 < measured["seconds"]["low"] <= measured["seconds"]["median"] <= measured["seconds"]["high"]
            assert measured["tokens_per_second"] > 0 and 0 < measured["share_of_matrix_rate"] < 1
            assert f"{part:20}{variant} " in printed
        assert metrics[part][first]["time_ratio"] == {"median": 1, "low": 1, "high": 1}
    mib = {name: value["step_mib"] for name, value in metrics["experts"].items() if isinstance(value, dict)}
    assert mib["LoRA"] <= mib["iLoRA"] < mib["every expert's output"]
    assert metrics["checkpointing"]["checkpointed"]["memory_ratio"] < 1
    assert metrics["logits"]["answer logits"]["memory_ratio"] < 1


def test_the_shape_calls_is_measured_under_autocast(tmp_path):
    flags = ["--shape", "calls", "--device", "cpu", "--rounds", "2", "--tokens", "8", "--answer", "2"]
    benchmark.main([*flags, "--out", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["name"] == "benchmark_adapter_calls"
    assert set(result["metrics"]) == {"matmul", "adapter"} and result["metrics"]["adapter"]["iLoRA"]["at_most"] == 1.02


def test_a_part_that_fails_is_reported_and_the_next_one_starts(tmp_path, capsys, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("no room for every expert\nand more")

    monkeypatch.setattr(benchmark.PerExpert, "forward", too_large)
    out = tmp_path / "result.json"
    benchmark.main([*SMALL, "--parts", "experts", "adapter", "--out", str(out)])
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["experts"] == {"error": "OutOfMemoryError: no room for every expert"}
    assert metrics["adapter"]["iLoRA"]["time_ratio"]["median"] > 0
    assert "no room for every expert" in capsys.readouterr().out


def test_parts_after_the_time_limit_are_reported(tmp_path):
    benchmark.main([*SMALL, "--minutes", "1e-9", "--parts", "adapter", "--out", str(tmp_path / "result.json")])
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["adapter"] == {"error": "TimeoutError: not started: 1e-09 minutes are over"}


@pytest.mark.parametrize("most", [9, 20, 33])
def test_the_search_for_the_largest_batch_goes_up_and_down(monkeypatch, most):
    """The memory of one row suggests that 20 rows fit, but `most` rows fit."""
    options = argparse.Namespace(device="cpu", shape="smoke", rows=2, more_rows=3, tokens=12, answer=3, rounds=1)
    bench = benchmark.Bench(options)
    monkeypatch.setattr(benchmark, "free", lambda: None)
    monkeypatch.setattr(bench, "memory", lambda step: 2.0)
    monkeypatch.setattr(benchmark, "room", lambda device: 20.5)

    def step(rows, **how):
        def run():
            if rows > most:
                raise torch.OutOfMemoryError("no room")

        return run

    monkeypatch.setattr(bench, "step", step)
    largest = bench.largest("largest batch")
    assert largest.keys() == benchmark.PARTS["largest batch"].keys()
    assert all(0.96 * most - 1 <= variant["rows"] <= most for variant in largest.values())


def test_a_step_with_more_rows_than_the_batch_repeats_them():
    options = argparse.Namespace(device="cpu", shape="smoke", rows=2, more_rows=3, tokens=12, answer=3, rounds=1)
    bench = benchmark.Bench(options)
    memory = [bench.memory(bench.step(rows)) for rows in (2, 4, 8)]
    assert memory[0] < memory[1] < memory[2]


def test_the_sum_over_experts_has_the_logits_of_the_adapter():
    options = argparse.Namespace(device="cpu", shape="smoke", rows=2, more_rows=3, tokens=12, answer=3, rounds=1)
    bench, logits = benchmark.Bench(options), []
    for written_out in (False, True):
        torch.manual_seed(1)
        model = bench.model(4, written_out, False, False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        logits.append(model(bench.ids, sequence_embeds=bench.z).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert (logits[0] - bench.base(bench.ids).logits).abs().max() > 1e-2


def test_memory_is_the_peak_of_a_step():
    options = argparse.Namespace(device="cpu", shape="smoke", rows=2, more_rows=3, tokens=12, answer=3, rounds=1)
    bench = benchmark.Bench(options)

    def step():
        for _ in range(3):
            torch.empty(2**20)  # 4 MiB, freed each time

    assert math.isclose(bench.memory(step), 4, rel_tol=0.01)
    assert math.isclose(bench.memory(lambda: [torch.empty(2**20) for _ in range(3)]), 12, rel_tol=0.01)


def test_a_smoke_run_needs_out(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--shape", "smoke"])
    assert "--out" in capsys.readouterr().err


def test_an_answer_as_long_as_the_row_is_an_error(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--tokens", "8", "--answer", "8"])
    assert "choose more --tokens" in capsys.readouterr().err
