"""Results of sweeps are selected, paired by seed and summed up over seeds; what is not there is not an error."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ilora import runs
from ilora.__main__ import plan
from ilora.study import sweep_results
from ilora.study.results import records


def write(folder, notebook="04", metrics=None, without=(), commit="c0ffee", **given):
    """A result as `sweep.publish` leaves it, of the notebook's defaults and what is given."""
    (job,) = plan({"device": "cpu"} | given, [notebook])
    parameters = {name: value for name, value in job.parameters.items() if name not in without}
    device = {"type": "cpu", "name": "a CPU", "threads": 1}
    result = {"name": job.source.stem, "parameters": parameters, "metrics": metrics, "device": device, "commit": commit}
    runs.write_json(folder / f"{job.source.stem}-{runs.key(parameters)}.json", result)


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 1000, "users": 200}


def hits(lora, ilora, validation=()):
    return {
        "LoRA": {"hit_ratio": interval(lora)},
        "iLoRA": {"hit_ratio": interval(ilora)},
        "difference": interval(ilora - lora),
        "training": {"sequences": 20000, "validation": {"LoRA": [v / 2 for v in validation], "iLoRA": [*validation]}},
    }


# ---------------------------------------------------------------- reading and choosing


def test_a_result_is_a_row_with_values_and_what_it_changed(tmp_path):
    write(tmp_path, metrics=hits(0.5, 0.6), without=("gate_per_layer", "gate_top_k"))  # of before they were there
    write(tmp_path, metrics=hits(0.4, 0.6), conflict=1.0, guidance="random", seed=3)
    write(tmp_path, metrics=hits(0.3, 0.3), experts=1)  # LoRA, which the others hold
    write(tmp_path, "06", metrics={"gate": {"between groups": {"value": 0.2, "p": 0.01, "n": 9}}})
    table = sweep_results.load_runs(tmp_path, "04").sort_values("seed")
    assert (table["LoRA.hit_ratio"].tolist(), table["iLoRA.hit_ratio"].tolist()) == ([0.5, 0.4], [0.6, 0.6])
    assert table["changed"].tolist() == [(), ("conflict", "guidance")]
    assert table["setting"].tolist() == ["world", "world, conflict 1.0"]
    assert table["gate_top_k"].tolist() == [0, 0] and table["device"].tolist() == ["a CPU"] * 2
    assert not [name for name in table if name.endswith((".low", ".high", ".n", ".users"))]
    (other,) = sweep_results.load_runs(tmp_path, "06").to_dict("records")
    assert (other["gate.between groups"], other["gate.between groups.p"]) == (0.2, 0.01)


def test_usual_frees_what_it_is_told_to(tmp_path):
    for given in ({}, {"seed": 1}, {"conflict": 1.0}, {"conflict": 1.0, "experts": 8}, {"experts": 8}):
        write(tmp_path, metrics=hits(0.5, 0.6), **given)
    table = sweep_results.load_runs(tmp_path, "04")
    assert len(sweep_results.default_runs(table)) == 2
    assert len(sweep_results.default_runs(table, "conflict")) == 3
    assert len(sweep_results.default_runs(table, "conflict", "experts")) == 5
    assert sweep_results.repeated(table, "experts", "setting")["seed"].tolist() == table["seed"].tolist()
    alone = sweep_results.default_runs(table, "conflict")
    assert sweep_results.repeated(alone, "experts", "setting").empty
    assert sweep_results.repeated(alone, "nowhere", "setting").empty


def test_lora_is_one_expert_once_a_seed(tmp_path):
    for experts, ilora in ((2, 0.6), (8, 0.7)):
        write(tmp_path, metrics=hits(0.5, ilora, [0.2, 0.4]), experts=experts, epochs=2)
    found = sweep_results.with_lora(sweep_results.load_runs(tmp_path, "04"))
    values = dict(zip(found["experts"], found["iLoRA.hit_ratio"], strict=True))
    assert len(found) == 3 and values == {1: 0.5, 2: 0.6, 8: 0.7}
    course = sweep_results.validation_by_epoch(found).sort_values(["experts", "epoch"])
    assert course["epoch"].tolist() == [1, 2] * 3
    assert course["hit_ratio"].tolist() == [0.1, 0.2, 0.2, 0.4, 0.2, 0.4]


# ---------------------------------------------------------------- over seeds


def test_means_over_seeds_have_students_interval():
    table = pd.DataFrame(
        {"k": [1, 1, 1, 2], "seed": [0, 1, 2, 0], "a": [0.1, 0.2, 0.3, 0.5], "b": [1.0, 1.0, None, 1.0]}
    )
    found = sweep_results.means_over_seeds(table, ["k"], {"A": "a", "B": "b", "C": "nowhere"}).set_index(
        ["system", "k"]
    )
    low, high = stats.ttest_1samp([0.1, 0.2, 0.3], 0).confidence_interval()
    columns = ["value", "low", "high", "n"]
    assert found.loc[("A", 1), columns].tolist() == pytest.approx([0.2, low, high, 3])
    assert found.loc[("A", 1), "runs"] == [0.1, 0.2, 0.3]
    assert found.loc[("B", 1), columns].tolist() == pytest.approx([1, 1, 1, 2])
    assert found.loc[("A", 2), "value"] == 0.5 and found.loc[("A", 2), ["low", "high"]].isna().all()  # one run
    assert "C" not in found.index
    with pytest.raises(runs.UserError, match=r"two results have the same seed at \{'k': 1\}"):
        sweep_results.means_over_seeds(table.assign(seed=0), ["k"], {"A": "a"})


def test_less_is_a_difference_run_by_run():
    table = pd.DataFrame({"seed": [1, 0, 2], "a": [0.5, 0.9, None], "b": [0.4, 0.5, 1.0]})
    assert sweep_results.mean_difference(table, "a", "b")["runs"] == pytest.approx([0.4, 0.1])
    assert sweep_results.mean_difference(table, "a", "nowhere")["n"] == 0


def test_a_slope_is_of_each_seed_and_then_over_seeds():
    table = pd.DataFrame({"seed": [0, 0, 1, 1, 2, 2, 3], "x": [0, 1, 0, 1, 0, 2, 1], "y": [5, 6.0, 0, 3, 1, 5, 9]})
    found = sweep_results.mean_slope(table, "x", "y")
    assert found["runs"] == pytest.approx([1, 3, 2]) and found["value"] == pytest.approx(2)  # seed 3 has one x alone
    assert found["low"] < 0 < found["high"] and found["n"] == 3
    doubled = pd.DataFrame({"seed": 0, "x": [8, 16, 32], "y": [0.1, 0.2, 0.3]})
    assert sweep_results.mean_slope(doubled, "x", "y", per_doubling=True)["value"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("low", "high", "n", "said", "of_slope"),
    [
        (
            0.1,
            0.3,
            3,
            "the gain is above zero: 0.200 [0.100, 0.300], n = 3 seeds",
            "the gain grows with conflict: 0.200",
        ),
        (-0.3, -0.1, 3, "the gain is below zero: -0.200", "the gain falls with conflict"),
        (
            -0.1,
            0.5,
            3,
            "the gain is not significantly different from zero: 0.200",
            "the gain does not change significantly with conflict",
        ),
        (np.nan, np.nan, 1, "the gain: 1 seeds with a result, too few", "the gain: 1 seeds with a result, too few"),
    ],
)
def test_a_sentence_says_what_its_interval_says(low, high, n, said, of_slope):
    found = {"value": (low + high) / 2, "low": low, "high": high, "n": n}
    assert sweep_results.conclusion("the gain", found).startswith(said)
    assert sweep_results.conclusion("the gain", found, "conflict").startswith(of_slope)


# ---------------------------------------------------------------- variants


@pytest.fixture
def paired(tmp_path):
    """Seeds differ by far more than guidance does: pairs tell it, means would not."""
    for seed, level in enumerate((0.1, 0.5, 0.9)):
        write(tmp_path, metrics=hits(level - 0.05 - 0.01 * seed, level), seed=seed)
        write(tmp_path, metrics=hits(level - 0.05, level - 0.02 - 0.001 * seed), seed=seed, guidance="random")
        write(tmp_path, metrics=hits(0, 0.3), seed=seed, guidance="random", experts=8)  # two changes: not this question
    write(tmp_path, metrics=hits(0.3, 0.4), guidance="token", conflict=1.0)  # its default has not been run
    return sweep_results.differences_from_default(sweep_results.load_runs(tmp_path, "04"), "guidance")


def test_a_variant_is_compared_with_the_default_of_its_seed_and_setting(paired):
    found = paired.set_index("variant")
    assert list(found.index) == ["LoRA, no gate", "guidance random"] and set(found["setting"]) == {"world"}
    differences = [-0.02, -0.021, -0.022]
    assert found.loc["guidance random", "runs"] == pytest.approx(differences)
    assert found.loc["guidance random", ["value", "n"]].tolist() == pytest.approx([-0.021, 3])
    test = stats.ttest_1samp(differences, 0)
    assert found.loc["guidance random", "p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert found.loc["guidance random", ["low", "high"]].tolist() == pytest.approx([interval.low, interval.high])
    assert found.loc["LoRA, no gate", "value"] == pytest.approx(-0.06)
    said = "before any correction 1 of 1 intervals exclude zero: guidance random (world)"  # LoRA is none
    assert sweep_results.count_without_zero(paired) == said
    assert (
        sweep_results.count_without_zero(paired.assign(high=1)) == "before any correction 0 of 1 intervals exclude zero"
    )


def test_a_question_may_change_other_parameters_along(tmp_path):
    for given in ({}, {"rank": 16, "alpha": 64.0}, {"rank": 16, "alpha": 64.0, "experts": 8}, {"experts": 8}):
        write(tmp_path, metrics=hits(0.5, 0.6), **given)
    found = sweep_results.differences_from_default(sweep_results.load_runs(tmp_path, "04"), "rank", "alpha", "experts")
    assert list(found["variant"]) == ["LoRA, no gate", "rank 16, alpha 64", "rank 16, alpha 64, experts 8"]
    assert found["p"].isna().all() and sweep_results.count_without_zero(found).startswith(
        "before any correction 0 of 0"
    )  # one seed tells nothing


def test_p_values_are_adjusted_for_all_variants_each_counted_once():
    first = pd.DataFrame({"setting": "world", "variant": ["a", "b"], "p": [0.04, 0.01]})
    second = pd.DataFrame({"setting": "world", "variant": ["c", "of one seed", "a"], "p": [0.02, None, 0.04]})
    table = sweep_results.with_adjusted_p(sweep_results.without_repeats([first, second]))
    assert list(table["variant"]) == ["a", "b", "c", "of one seed"]
    assert table["p, adjusted"].tolist() == pytest.approx([0.04, 0.03, 0.03, np.nan], nan_ok=True)


def test_nothing_to_compare_is_empty_and_not_an_error(tmp_path):
    table = sweep_results.load_runs(tmp_path, "04")
    assert table.empty and sweep_results.default_runs(table, "conflict").empty
    assert sweep_results.with_lora(table).empty and sweep_results.validation_by_epoch(table).empty
    found = sweep_results.differences_from_default(table, "guidance")
    assert found.empty and sweep_results.count_without_zero(found).startswith("before any correction 0 of 0")
    assert sweep_results.means_over_seeds(table, ["conflict"], {"LoRA": "LoRA.hit_ratio"}).empty
    assert sweep_results.mean_slope(table, "conflict", "difference")["n"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records(sweep_results.with_adjusted_p(sweep_results.without_repeats([found]))) == []


def test_records_can_be_written_as_json():
    rows = records(pd.DataFrame([sweep_results.student_interval([0.5]) | {"p": np.nan}]))
    assert json.loads(json.dumps(rows, allow_nan=False)) == [
        {"value": 0.5, "low": None, "high": None, "n": 1, "runs": [0.5], "p": None}
    ]


def test_gates_are_read_of_runs_that_kept_them(tmp_path):
    gate = {"users": [7, 8], "weights": [[0.25, 0.75], [0.5, 0.5]]}
    write(tmp_path, metrics={"gate": gate}, experts=2)
    write(tmp_path, metrics={"gate": {"entropy": {"value": 1.0}}}, experts=8)
    (experts, weights), *others = sweep_results.saved_gate_weights(sweep_results.load_runs(tmp_path, "04")).items()
    assert experts == 2 and not others
    assert weights.index.tolist() == [7, 8] and weights.loc[7].tolist() == [0.25, 0.75]
