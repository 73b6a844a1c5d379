"""The benchmark at a size that measures nothing: that it runs, reports, and writes what a result must hold."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "adapter.py"
SMALL = ["--smoke", "--device", "cpu", "--rounds", "2", "--rows", "2", "--tokens", "12", "--answer", "3"]


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_part_is_measured_and_written(benchmark, tmp_path, capsys):
    parts = [part for part in benchmark.PARTS if part != "compile"]
    benchmark.main([*SMALL, "--out", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"name", "parameters", "metrics", "seconds", "device", "versions", "commit", "date"} <= result.keys()
    assert result["parameters"] == {
        "device": "cpu", "rounds": 2, "rows": 2, "tokens": 12, "answer": 3, "smoke": True
    }  # fmt: skip
    metrics = result["metrics"]
    assert set(metrics) == {"matmul", *parts}
    printed = capsys.readouterr().out
    for part in parts:
        first, *others = benchmark.PARTS[part]
        for variant in (first, *others):
            found = metrics[part][variant]
            assert 0 < found["seconds"]["low"] <= found["seconds"]["median"] <= found["seconds"]["high"]
            assert found["tokens_per_second"] > 0 and 0 < found["share_of_matrix_rate"] < 1
            assert f"{part:14}{variant} " in printed
        assert metrics[part][first]["time_ratio"] == {"median": 1, "low": 1, "high": 1}
    mib = {name: found["step_mib"] for name, found in metrics["experts"].items() if isinstance(found, dict)}
    assert mib["LoRA"] <= mib["iLoRA"] < mib["every expert's output"]
    assert metrics["checkpointing"]["checkpointed"]["memory_ratio"] < 1
    assert metrics["logits"]["answer logits"]["memory_ratio"] < 1


def test_a_part_that_fails_is_reported_and_the_others_go_on(benchmark, tmp_path, capsys, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("no room for every expert\nand more")

    monkeypatch.setattr(benchmark.PerExpert, "forward", too_large)
    out = tmp_path / "result.json"
    benchmark.main([*SMALL, "--parts", "experts", "adapter", "--out", str(out)])
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["experts"] == {"error": "OutOfMemoryError: no room for every expert"}
    assert metrics["adapter"]["iLoRA"]["time_ratio"]["median"] > 0
    assert "no room for every expert" in capsys.readouterr().out


def test_the_formula_written_out_is_the_adapter(benchmark):
    """The variant that it is compared with computes the same: loss gradients agree."""
    options = benchmark.argparse.Namespace(device="cpu", smoke=True, rows=2, tokens=12, answer=3, rounds=1)
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


def test_memory_is_what_a_step_allocates_at_its_peak(benchmark):
    options = benchmark.argparse.Namespace(device="cpu", smoke=True, rows=2, tokens=12, answer=3, rounds=1)
    bench = benchmark.Bench(options)

    def step():
        for _ in range(3):
            torch.empty(2**20)  # 4 MiB, freed each time

    assert math.isclose(bench.memory(step), 4, rel_tol=0.01)
    assert math.isclose(bench.memory(lambda: [torch.empty(2**20) for _ in range(3)]), 12, rel_tol=0.01)


def test_a_smoke_run_needs_a_place_of_its_own(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--smoke"])
    assert "--out" in capsys.readouterr().err
