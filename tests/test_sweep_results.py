"""Results of sweeps: selected, averaged over seeds, compared with the default of the same seed."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

from ilora import artifacts
from ilora.errors import UserError
from ilora.study import sweep_results
from ilora.study.notebooks import plan
from ilora.study.results import records
from ilora.study.systems import SYSTEMS

pytestmark = pytest.mark.book


def write(folder, notebook="04", metrics=None, without=(), inputs=None, kind="cpu", **parameters):
    """A result as `book.publish` leaves it, of the notebook's defaults and the given parameters."""
    (job,) = plan({"device": "cpu"} | parameters, [notebook])
    parameters = {name: value for name, value in job.parameters.items() if name not in without}
    result = {"parameters": parameters, "metrics": metrics, "device": {"type": kind}, "commit": "c0ffee"}
    result |= {"inputs": inputs} if inputs else {}  # older results have none
    artifacts.write_json(folder / f"{job.source.stem}-{len([*folder.iterdir()])}.json", result)


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 1000, "users": 200}


def hits(lora, ilora, validation=()):
    return {
        "LoRA": {"hit_ratio": interval(lora)},
        "iLoRA": {"hit_ratio": interval(ilora)},
        "training": {"validation": {"LoRA": [v / 2 for v in validation], "iLoRA": [*validation]}},
    }


def test_a_result_is_a_row_with_values_and_what_it_changed(tmp_path):
    write(tmp_path, metrics=hits(0.5, 0.6), without=("gate_per_layer", "gate_top_k"))  # as in an older result
    write(tmp_path, metrics=hits(0.4, 0.6), conflict=1.0, guidance="random", seed=3)
    write(tmp_path, metrics=hits(0.3, 0.3), experts=1)  # LoRA, which every run has
    write(tmp_path, "06", metrics={"gate": {"between groups": {"value": 0.2, "p": 0.01, "n": 9}, "users": [7]}})
    table = sweep_results.load_runs(tmp_path, "04").sort_values("seed")
    assert (table["LoRA.hit_ratio"].tolist(), table["iLoRA.hit_ratio"].tolist()) == ([0.5, 0.4], [0.6, 0.6])
    assert table["changed"].tolist() == [(), ("conflict", "guidance")]
    assert table["setting"].tolist() == ["world", "world, conflict 1.0"]
    assert table["gate_top_k"].tolist() == [0, 0] and table["precision"].tolist() == ["float32"] * 2
    assert not [name for name in table if name.endswith((".low", ".high", ".n", ".users"))]
    (row,) = sweep_results.load_runs(tmp_path, "06").to_dict("records")
    assert (row["gate.between groups"], row["gate.between groups.p"], row["gate.users"]) == (0.2, 0.01, [7])


def test_results_on_different_data_are_refused(tmp_path):
    for seed, data in enumerate(["a", "a", None]):
        write(tmp_path, metrics=hits(0.3, 0.4), inputs=data and {"data": data}, dataset="movielens", seed=seed)
        write(tmp_path, metrics=hits(0.3, 0.4), inputs={"data": f"world {seed}"}, seed=seed)  # a world for each seed
    assert len(sweep_results.load_runs(tmp_path, "04")) == 6
    write(tmp_path, metrics=hits(0.3, 0.4), inputs={"data": "b"}, dataset="movielens", seed=3)
    with pytest.raises(UserError, match="has results of 'movielens' on different data"):
        sweep_results.load_runs(tmp_path, "04")


def test_runs_are_selected_by_what_they_changed(tmp_path):
    for given in ({}, {"seed": 1}, {"conflict": 1.0}, {"conflict": 1.0, "experts": 8}, {"experts": 8}):
        write(tmp_path, metrics=hits(0.5, 0.6), **given)
    table = sweep_results.load_runs(tmp_path, "04")
    by_conflict = sweep_results.default_runs(table, "conflict")
    assert (len(sweep_results.default_runs(table)), len(by_conflict)) == (2, 3)
    assert len(sweep_results.default_runs(table, "conflict", "experts")) == 5


def test_means_over_seeds_have_students_interval():
    table = pd.DataFrame(
        {"k": [1, 1, 1, 2], "seed": [0, 1, 2, 0], "a": [0.1, 0.2, 0.3, 0.5], "b": [1.0, 1.0, None, 1.0]}
    )
    means = sweep_results.means_over_seeds(table, ["k"], {"A": "a", "B": "b", "C": "missing"})
    means = means.set_index(["system", "k"])
    low, high = stats.ttest_1samp([0.1, 0.2, 0.3], 0).confidence_interval()
    columns = ["value", "low", "high", "n"]
    assert means.loc[("A", 1), columns].tolist() == pytest.approx([0.2, low, high, 3])
    assert means.loc[("A", 1), "runs"] == [0.1, 0.2, 0.3]
    assert means.loc[("B", 1), columns].tolist() == pytest.approx([1, 1, 1, 2])
    assert means.loc[("A", 2), "value"] == 0.5 and means.loc[("A", 2), ["low", "high"]].isna().all()  # one run
    assert "C" not in means.index
    with pytest.raises(UserError, match=r"two results have the same seed at \{'k': 1\}"):
        sweep_results.means_over_seeds(table.assign(seed=0), ["k"], {"A": "a"})


def test_slopes_are_fitted_per_seed_and_averaged():
    table = pd.DataFrame({"seed": [0, 0, 1, 1, 2, 2, 3], "x": [0, 1, 0, 1, 0, 2, 1], "y": [5, 6.0, 0, 3, 1, 5, 9]})
    slope = sweep_results.mean_slope(table, "x", "y")
    assert slope["runs"] == pytest.approx([1, 3, 2])  # seed 3 has a single x
    assert slope["value"] == pytest.approx(2) and slope["low"] < 0 < slope["high"]


@pytest.mark.parametrize(
    ("low", "high", "n", "level", "slope"),
    [
        (0.1, 0.3, 3, " is above zero: 0.200 [0.100, 0.300], n = 3 seeds", " grows with conflict: slope 0.200"),
        (-0.3, -0.1, 3, " is below zero: -0.200", " falls with conflict"),
        (-0.1, 0.5, 3, " is not significantly different from zero", " does not change significantly with conflict"),
        (np.nan, np.nan, 1, ": too few seeds for an interval (n = 1)", ": too few seeds"),
    ],
)
def test_a_conclusion_follows_from_the_interval(low, high, n, level, slope):
    mean = {"value": (low + high) / 2, "low": low, "high": high, "n": n}
    assert sweep_results.conclusion("the gain", mean).startswith("the gain" + level)
    assert sweep_results.conclusion("the gain", mean, "conflict").startswith("the gain" + slope)


def test_a_variant_is_compared_with_the_default_of_its_seed_and_setting(tmp_path):
    for seed, level in enumerate((0.1, 0.5, 0.9)):  # seeds differ far more than variants: only pairs show these
        write(tmp_path, metrics=hits(level - 0.05 - 0.01 * seed, level), seed=seed)
        write(tmp_path, metrics=hits(level - 0.05, level - 0.02 - 0.001 * seed), seed=seed, guidance="random")
        write(tmp_path, metrics=hits(0, 0.3), seed=seed, guidance="random", experts=8)  # changes more than guidance
    write(tmp_path, metrics=hits(0.3, 0.4), guidance="token", conflict=1.0)  # has no default run
    table = sweep_results.differences_from_default(sweep_results.load_runs(tmp_path, "04"), "guidance")
    by_variant = table.set_index("variant")
    assert list(by_variant.index) == ["LoRA, no gate", "random guidance"] and set(table["setting"]) == {"world"}
    row, differences = by_variant.loc["random guidance"], [-0.02, -0.021, -0.022]
    test = stats.ttest_1samp(differences, 0)
    assert row["runs"] == pytest.approx(differences) and row["p"] == pytest.approx(test.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert by_variant.loc["LoRA, no gate", "value"] == pytest.approx(-0.06)
    count = "before any correction, {} of 1 intervals {} zero".format  # LoRA is not counted
    assert sweep_results.count_without_zero(table) == count(1, "excludes")
    assert sweep_results.count_without_zero(table.assign(high=1)) == count(0, "exclude")


def test_a_variant_is_not_compared_with_a_default_of_another_precision(tmp_path):
    for seed in (0, 1):
        write(tmp_path, metrics=hits(0.5, 0.6), seed=seed, kind="cuda")
        write(tmp_path, metrics=hits(0.5, 0.7), seed=seed, kind="cpu", guidance="random")
    table = sweep_results.load_runs(tmp_path, "04")
    assert sweep_results.differences_from_default(table, "guidance").empty


def results_of_the_table(system, hit, dataset="movielens"):
    """Two seeds with the same hits on three questions of three users."""
    outcomes = {"all questions": ["a"], "all windows": [1, 1, 1], "all hit": [hit], "all valid": ["111"]}
    about = {"system": system, "dataset": dataset}
    same = {"outcomes": outcomes, "versions": {"ilora": "0.3.0"}, "inputs": {"data": "d"}}
    return [{"parameters": about | {"seed": seed}, **same} for seed in (0, 1)]


def test_a_variant_on_real_data_is_compared_with_ilora(monkeypatch):
    variant = "iLoRA, K = 2"
    monkeypatch.setitem(SYSTEMS, variant, SYSTEMS["iLoRA"])
    results = results_of_the_table("iLoRA", "110") + results_of_the_table("LLaRA", "100")
    assert sweep_results.differences_from_ilora(results, "K = 2").empty  # without a variant
    one_seed = results_of_the_table(variant, "111")[:1]
    assert sweep_results.differences_from_ilora(results + one_seed, "K = 2").empty
    results += results_of_the_table(variant, "111") + results_of_the_table("iLoRA", "111", "lastfm")
    table = sweep_results.differences_from_ilora(results, "K = 2")
    assert table[["setting", "variant", "n"]].to_numpy().tolist() == [
        ["MovieLens", "LoRA, no gate", 2],
        ["MovieLens", "K = 2", 2],
    ]
    assert table["value"].tolist() == pytest.approx([-1 / 3, 1 / 3])
    assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()
    assert table["p"].tolist() == pytest.approx([0.423] * 2, abs=0.001)  # of three users, one of whom differs
    assert sweep_results.differences_from_ilora(results, "K = 8").empty
    assert sweep_results.differences_from_ilora([], "K = 2").empty


def test_a_variant_may_change_several_parameters(tmp_path):
    for given in ({}, {"rank": 16, "alpha": 64.0}, {"rank": 16, "alpha": 64.0, "experts": 8}, {"experts": 8}):
        write(tmp_path, metrics=hits(0.5, 0.6), **given)
    table = sweep_results.differences_from_default(sweep_results.load_runs(tmp_path, "04"), "rank", "alpha", "experts")
    assert list(table["variant"]) == ["LoRA, no gate", "rank 16, alpha 64", "rank 16, alpha 64, K = 8"]
    assert table["p"].isna().all()  # one seed
    assert sweep_results.count_without_zero(table).startswith("before any correction, 0 of 0")


@pytest.mark.filterwarnings("error")
def test_tables_of_nothing_are_empty(tmp_path):
    table = sweep_results.load_runs(tmp_path, "04")
    assert table.empty and sweep_results.default_runs(table, "conflict").empty
    assert sweep_results.means_over_seeds(table, ["conflict"], {"LoRA": "LoRA.hit_ratio"}).empty
    assert sweep_results.mean_slope(table, "conflict", "difference")["n"] == 0
    differences = sweep_results.differences_from_default(table, "guidance")
    assert sweep_results.count_without_zero(differences).startswith("before any correction, 0 of 0")
    assert records(differences) == []


def test_records_can_be_written_as_json():
    rows = records(pd.DataFrame([sweep_results.student_interval([0.5]) | {"p": np.nan}]))
    expected = {"value": 0.5, "low": None, "high": None, "n": 1, "runs": [0.5], "p": None}
    assert json.loads(json.dumps(rows, allow_nan=False)) == [expected]


def test_the_sweeps_of_the_book_are_still_of_the_notebooks_default_parameters():
    """A default that changes must not silently empty chapters 5 and 11."""
    published = sweep_results.load_runs(ROOT / "book" / "results" / "sweeps", "04")
    assert len(sweep_results.default_runs(published, "experts")["experts"].unique()) > 1
    assert len(sweep_results.default_runs(published, "conflict")["conflict"].unique()) > 2
