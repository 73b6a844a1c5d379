"""Tables of the benchmarks' results, from a result made by hand."""

import pytest

from ilora.errors import UserError
from ilora.study import benchmark_results

pytestmark = pytest.mark.book


def way(ratio, **more):
    ratios = {"median": ratio, "low": ratio - 1, "high": ratio + 1}
    return {"time_ratio": ratios, "seconds": {"median": 2 * ratio}, **more}


LORA = {"LoRA": way(1, tokens_per_second=5.0), "iLoRA": way(1.02, at_most=1.02, tokens_per_second=4.9)}
RESULTS = {
    "a_cpu": {
        "metrics": {
            "one": {"usual": way(9, at_least=10), "ours": way(1), "to": "ours", "rows": 7, "agreement": {"same": True}},
            "two": {**LORA, "other": way(3), "rows": 3, "to": "LoRA"},
            "three": {"error": "OutOfMemoryError: no room"},
        }
    },
    "b_cpu": {"metrics": {"four": {"peak": {"value": 5.0, "at_most": 6, "low": 4, "high": 7}, "x": {"y": 1}, "n": 3}}},
}


def test_ratios_refer_to_the_named_way_and_meet_goals_from_the_right_side():
    table = benchmark_results.ratios(RESULTS)
    assert table["tokens_per_second"].dropna().tolist() == [5.0, 4.9]
    assert table["value"].tolist() == [9, 1, 1, 1.02, 3]
    table = table[table["to"] != table.index.get_level_values("way")]
    assert table.index.tolist() == [("a_cpu", "one", "usual"), ("a_cpu", "two", "iLoRA"), ("a_cpu", "two", "other")]
    assert table["met"].tolist() == [False, True, None]
    assert table["goal"].tolist() == ["at least 10", "at most 1.02", ""]
    assert table["to"].tolist() == ["ours", "LoRA", "LoRA"] and table["rows"].tolist() == [7, 3, 3]
    assert table["seconds"].tolist() == [18, 2.04, 6] and table["seconds_to"].tolist() == [2, 2, 2]
    assert table[["low", "value", "high"]].iloc[0].tolist() == [8, 9, 10]


@pytest.mark.parametrize(
    ("value", "goals", "met"),
    [(10, {"at_least": 10}, True), (9.99, {"at_least": 10}, False), (1.03, {"at_most": 1.02}, False), (3, {}, None)],
)
def test_a_goal_is_met_missed_or_absent(value, goals, met):
    assert benchmark_results.judge(value, goals)["met"] is met


def test_failures_are_listed():
    failed = list(benchmark_results.parts(RESULTS, failed=True))
    assert failed == [("a_cpu", "three", {"error": "OutOfMemoryError: no room"})]


def test_a_table_without_rows_keeps_its_columns():
    make = benchmark_results.ratios
    assert make({}).empty and list(make({}).columns) == list(make(RESULTS).columns)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="make bench"):
        benchmark_results.load_benchmarks(tmp_path)
