import pandas as pd
import pytest

from ilora import runs
from ilora.study import benchmark_results


def way(ratio, **more):
    return {
        "time_ratio": {"median": ratio, "low": ratio - 1, "high": ratio + 1},
        "seconds": {"median": 2 * ratio},
    } | more


RESULTS = {
    "a_cpu": {
        "metrics": {
            "one": {
                "usual": way(9, at_least=10),
                "ours": way(1),
                "to": "ours",
                "rows": 7,
                "agreement": {"equal ids": True},
            },
            "two": {"LoRA": way(1, tokens_per_second=5.0), "iLoRA": way(1.02, at_most=1.02, tokens_per_second=4.9)}
            | {"rows": 3, "to": "LoRA"},
            "three": {"error": "OutOfMemoryError: no room"},
        }
    },
    "b_cpu": {
        "metrics": {"four": {"peak": {"value": 5.0, "at_most": 6, "low": 4, "high": 7}, "other": {"x": 1}, "count": 3}}
    },
}


def test_a_ratio_meets_its_goal_on_the_goals_own_side():
    found = benchmark_results.ratios(RESULTS)
    assert found.index.tolist() == [("a_cpu", "one", "usual"), ("a_cpu", "two", "iLoRA")]
    assert found["met"].tolist() == [False, True]
    assert found["goal"].tolist() == ["at least 10", "at most 1.02"]
    assert found["to"].tolist() == ["ours", "LoRA"] and found["rows"].tolist() == [7, 3]
    assert found["seconds"].tolist() == [18, 2.04] and found["seconds_to"].tolist() == [2, 2]
    assert found[["low", "value", "high"]].iloc[0].tolist() == [8, 9, 10]


def test_a_result_that_names_no_reference_and_no_goal_is_judged_all_the_same():
    one = {"time_ratio": {"median": 1.0, "low": 1.0, "high": 1.0}, "seconds": {"median": 1}}
    old = {"metrics": {"two": {"iLoRA": way(1.5, tokens_per_second=3.0), "LoRA": one, "rows": 3}}}
    found = benchmark_results.ratios(RESULTS | {"old_cuda": old}).loc[("old_cuda", "two", "iLoRA")]
    assert found["to"] == "LoRA" and found["goal"] == "at most 1.02" and not found["met"]
    assert benchmark_results.steps({"old_cuda": old})["to"].tolist() == ["LoRA"]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(runs.UserError, match="make bench"):
        benchmark_results.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "aim", "met"),
    [(10, ("at_least", 10), True), (9.99, ("at_least", 10), False), (1.03, ("at_most", 1.02), False), (3, None, None)],
)
def test_a_goal_is_met_or_missed_or_not_there(value, aim, met):
    assert benchmark_results.judged(value, aim)["met"] is met


def test_other_tables_take_what_is_theirs():
    assert benchmark_results.limits(RESULTS).loc[
        ("b_cpu", "four", "peak"), ["value", "low", "high", "met"]
    ].tolist() == [
        5,
        4,
        7,
        True,
    ]
    assert benchmark_results.failures(RESULTS)["error"].to_dict() == {("a_cpu", "three"): "OutOfMemoryError: no room"}
    assert benchmark_results.agreement(RESULTS)["value"].to_dict() == {("a_cpu", "one", "equal ids"): "True"}
    assert benchmark_results.steps(RESULTS)["tokens_per_second"].tolist() == [5.0, 4.9]


def test_without_results_tables_are_empty():
    for table in (
        benchmark_results.ratios,
        benchmark_results.limits,
        benchmark_results.failures,
        benchmark_results.agreement,
        benchmark_results.steps,
        benchmark_results.provenance,
    ):
        assert isinstance(table({}), pd.DataFrame) and table({}).empty
