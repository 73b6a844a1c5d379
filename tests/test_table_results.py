"""Results of the table: loaded, compared and put into words; the outcomes are made by hand."""

import numpy as np
import pandas as pd
import pytest

from ilora.errors import UserError
from ilora.study import comparisons, table_results

pytestmark = pytest.mark.book


def test_mixed_settings_are_refused_and_other_questions_not_compared():
    def result(system, seed, questions, data="d", **settings):
        part = {"last hit": ["01"], "last valid": ["11"], "last questions": [questions], "last windows": [1, 1]}
        about = {"system": system, "dataset": "movielens", "seed": seed, "draws": 1, **settings}
        versions = {"ilora": "0.2.0" if data == "older key" else "0.3.0"}
        return {"parameters": about, "outcomes": part, "inputs": {"data": data}, "versions": versions}

    same = [result("iLoRA", 0, "a"), result("iLoRA", 1, "a"), result("Popularity", 0, "a")]
    assert table_results.outcomes_by_system(same, "movielens")["iLoRA"].hit.tolist() == [
        [[False, True]],
        [[False, True]],
    ]
    with pytest.raises(UserError, match="iLoRA on movielens differ in rank"):
        table_results.outcomes_by_system(
            [result("iLoRA", 0, "a", rank=8), result("iLoRA", 1, "a", rank=16)], "movielens"
        )
    with pytest.raises(UserError, match="two results of iLoRA on movielens with one seed"):
        table_results.outcomes_by_system([*same, result("iLoRA", 1, "a")], "movielens")
    with pytest.raises(UserError, match="different questions"):
        table_results.outcomes_by_system([result("iLoRA", 0, "a"), result("iLoRA", 1, "b")], "movielens")
    with pytest.raises(UserError, match="on movielens are of different data"):
        table_results.outcomes_by_system([*same, result("SASRec", 0, "a", "changed")], "movielens")
    assert table_results.outcomes_by_system([*same, result("SASRec", 0, "a", "older key")], "movielens")
    outcomes = table_results.outcomes_by_system(
        [*same, result("SASRec", 0, "b"), result("GRU4Rec", 2, "a")], "movielens"
    )
    assert list(table_results.compare_systems(outcomes).index) == ["Popularity", "GRU4Rec"]  # SASRec: other questions
    assert table_results.compare_systems({"iLoRA": outcomes["iLoRA"]}).empty


@pytest.mark.parametrize("other", ["LLaRA", "Popularity"])  # Popularity has a run per seed in the world alone
def test_runs_are_paired_by_their_seed(other):
    hit = np.array([[[0, 0, 1, 1]], [[1, 1, 0, 0]], [[0, 1, 0, 1]]], bool)
    ours = table_results.Outcomes((0, 1, 2), hit, hit, np.arange(4), ("a",), np.arange(4))
    theirs = table_results.Outcomes((1, 2), hit[1:], hit[1:], np.arange(4), ("a",), np.arange(4))  # seed 0 failed
    row = table_results.compare_systems({"iLoRA": ours, other: theirs}).loc[other]
    assert row["value"] == row["low"] == row["high"] == 0


def test_a_difference_is_that_of_the_two_means_if_both_have_the_same_runs():
    rng, users = np.random.default_rng(0), np.repeat(np.arange(10), 3)
    hits = {name: rng.random((3, 2, 30)) < share for name, share in (("iLoRA", 0.6), ("LLaRA", 0.4), ("SASRec", 0.5))}
    outcomes = {
        name: table_results.Outcomes((0, 1, 2), hit, hit, users, ("a", "b"), np.arange(30))
        for name, hit in hits.items()
    }
    means = table_results.system_means(outcomes)["value"].astype(float)
    for system in outcomes:
        compared = table_results.compare_systems(outcomes, system)["value"].astype(float)
        assert set(compared.index) == outcomes.keys() - {system}
        expected = means[system] - means[compared.index]
        np.testing.assert_allclose(compared, expected, atol=1e-12)
        assert expected.abs().min() > 0.01


def test_a_sample_is_compared_on_its_rows_alone():
    rng, users, rows = np.random.default_rng(0), np.repeat(np.arange(10), 3), np.array([1, 2, 5, 17, 18, 29])
    ours, theirs = rng.random((3, 2, 30)) < 0.6, rng.random((1, 2, 30)) < 0.3
    whole = table_results.Outcomes((0, 1, 2), ours, ours, users, ("a", "b"), np.arange(30))
    part = table_results.Outcomes((0,), theirs[..., rows], theirs[..., rows], users[rows], ("a", "b"), rows)
    row = table_results.compare_systems({"iLoRA": whole, "ChatRec": part}).loc["ChatRec"]
    expected = comparisons.paired_comparison(ours[..., rows], theirs[..., rows], users[rows])
    assert {name: row[name] for name in expected} == expected
    assert (row["n"], row["users"]) == (6, 5)
    back = table_results.compare_systems({"iLoRA": whole, "ChatRec": part}, "ChatRec").loc["iLoRA"]
    assert back["value"] == pytest.approx(-row["value"]) and back["n"] == 6
    none = table_results.Outcomes((0,), theirs[..., :0], theirs[..., :0], users[:0], ("a", "b"), rows[:0])
    assert table_results.compare_systems({"iLoRA": whole, "ChatRec": none}).empty


def test_the_hit_ratio_of_valid_is_the_ratio_of_sums():
    hit, valid = np.array([[[1, 0, 1, 0]]], bool), np.array([[[1, 1, 1, 0]]], bool)
    outcomes = {"iLoRA": table_results.Outcomes((0,), hit, valid, np.arange(4), ("a",), np.arange(4))}
    row = table_results.system_means(outcomes).loc["iLoRA"]
    assert (row["value"], row["hit_ratio_of_valid"], row["valid_ratio"]) == (0.5, pytest.approx(2 / 3), 0.75)


def test_a_difference_needs_its_test_and_its_interval():
    rows = {"A": (0.01, 0.1, 0.2), "B": (0.01, -0.1, 0.2), "C": (0.2, 0.1, 0.2), "D": (0.01, -0.2, -0.1)}
    compared = pd.DataFrame.from_dict(rows, orient="index", columns=["p_holm", "low", "high"])
    compared["value"] = compared[["low", "high"]].mean(axis=1)
    tables = {"one": compared, "two": compared.iloc[::-1], "three": compared.iloc[:0]}
    says = {other: table_results.verdict(tables, "iLoRA", other) for other in [*rows, "E"]}
    assert says == {
        "A": "iLoRA is above A on one and two",
        "B": "iLoRA is not significantly different from B on one and two",
        "C": "iLoRA is not significantly different from C on one and two",
        "D": "iLoRA is below D on one and two",
        "E": "iLoRA and E have no results on the same questions",
    }
    mixed = {"x": compared, "y": compared.rename(index={"A": "D", "D": "A"}), "z": compared}
    assert table_results.verdict(mixed, "iLoRA", "A") == "iLoRA is above A on x and z and below A on y"
    assert table_results.listed(["a", "b", "c"]) == "a, b and c"


def test_outcomes_that_are_all_wrong_have_an_interval():
    wrong = np.zeros((1, 5, 50), bool)
    outcomes = table_results.Outcomes((0,), wrong, wrong, np.arange(50), ("a",) * 5, np.arange(50))
    row = table_results.system_means({"ChatRec": outcomes}).loc["ChatRec"]
    assert row["value"] == 0 == row["low"] and 0.05 < row["high"] < 0.1  # Wilson's of 0 among 50
