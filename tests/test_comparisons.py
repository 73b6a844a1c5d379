"""Tables and sentences about several systems; exact tests against definitions, and coverage of the intervals."""

from itertools import product
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_evaluation import make_outcomes

from ilora.evaluation import compute_metrics
from ilora.study import comparisons
from ilora.study.comparisons import crossed_interval, holm, mcnemar, paired_comparison, sign_flip_test

# ---------------------------------------------------------------- what a page shows


def test_a_metric_table_has_integer_counts_and_omits_systems_without_the_metric():
    systems = {"a": make_outcomes([1, 0, 1]), "invalid": make_outcomes([0, 0], valid=[0, 0])}
    assert comparisons.metric_table(systems)["n"].tolist() == [3, 2]
    assert comparisons.metric_table(systems)["n"].dtype.kind == "i"
    table = comparisons.metric_table(systems, "hit_ratio_of_valid")
    assert list(table.index) == ["a"] and list(table.columns) == ["value", "low", "high", "n"]
    assert table.loc["a", "value"] == pytest.approx(2 / 3)


def test_formatted_metrics_hold_intervals_or_a_dash():
    systems = {"a": make_outcomes([1, 0, 1]), "invalid": make_outcomes([0, 0], valid=[0, 0])}
    table = comparisons.formatted_metrics(systems)
    assert table.loc["a", "hit_ratio"] == comparisons.format_interval(compute_metrics(systems["a"])["hit_ratio"])
    assert table.loc["invalid", "hit_ratio_of_valid"] == "-"
    assert comparisons.format_interval({"value": 0.5234, "low": -0.1, "high": 1, "n": 3}) == "0.523 [-0.100, 1.000]"


def test_a_sentence_says_which_system_is_better_or_that_the_difference_is_not_significant():
    hit = np.arange(300) % 3 == 0
    systems = {
        "weak": make_outcomes(hit),
        "strong": make_outcomes(hit | (np.arange(300) % 3 == 1)),
        "same": make_outcomes(hit),
    }
    for pair in (("strong", "weak"), ("weak", "strong")):
        assert comparisons.difference_sentence(systems, *pair).startswith("strong is above weak by 0.333 [0.")
    assert comparisons.difference_sentence(systems, "same", "weak").startswith(
        "The difference between same and weak is not significant: 0.000 ["
    )


# ---------------------------------------------------------------- intervals over seeds, draws and users


def scores(seeds=3, draws=4, users=60, windows=2, sd=(0.0, 0.0, 0.0, 1.0), mean=0.0, seed=0):
    """Values with effects of seeds, draws and users, and noise, of these standard deviations; and their users."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), windows)
    effects = rng.normal(size=seeds)[:, None, None] * sd[0] + rng.normal(size=draws)[:, None] * sd[1]
    effects = effects + (rng.normal(size=users) * sd[2])[user]
    return mean + effects + sd[3] * rng.normal(size=(seeds, draws, len(user))), user


def test_the_parts_are_the_errors_of_three_means():
    values, users = scores(windows=1, sd=(1, 1, 1, 1))
    result = crossed_interval(values, users)
    assert result["error_seeds"] == pytest.approx(stats.sem(values.mean((1, 2))))
    assert result["error_draws"] == pytest.approx(stats.sem(values.mean((0, 2))))
    assert result["error_users"] == pytest.approx(stats.sem(values.mean((0, 1))))
    assert (result["seeds"], result["draws"], result["n"], result["users"]) == (3, 4, 60, 60)


def test_another_draw_moves_a_run_by_as_much_however_many_runs_there_are():
    values = np.zeros((2, 2, 3))
    values[0, 0], values[1, 1] = 1, 1  # each run gets another draw right: their mean does not move, a run does
    result = crossed_interval(values, np.arange(3))
    assert result["error_draws"] == 0 and result["sd_draws"] == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize(("place", "part"), list(enumerate(["seeds", "draws", "users"])))
def test_what_varies_is_named(place, part):
    sd = [0.0, 0.0, 0.0, 0.05]
    sd[place] = 1.0
    result = crossed_interval(*scores(sd=sd))
    errors = {name: result[f"error_{name}"] for name in ("seeds", "draws", "users")}
    assert max(errors, key=errors.get) == part
    assert errors[part] > 10 * sorted(errors.values())[1]


def test_users_alone_give_students_interval():
    values, users = scores(seeds=1, draws=1, windows=1)
    result = crossed_interval(values, users)
    low, high = stats.t.interval(0.95, 59, values.mean(), stats.sem(values.ravel()))
    assert (result["low"], result["high"]) == pytest.approx((low, high))
    assert result["p_student"] == pytest.approx(stats.ttest_1samp(values.ravel(), 0).pvalue)
    assert result["error_seeds"] is None and result["error_draws"] is None and result["sd_draws"] is None


def test_windows_of_one_user_are_not_counted_as_independent():
    values, users = scores(seeds=1, draws=1, windows=1)
    often = crossed_interval(np.repeat(values, 5, axis=2), np.repeat(users, 5))
    assert often["error_users"] == pytest.approx(crossed_interval(values, users)["error_users"])


def test_the_interval_has_its_coverage():
    """Seeds, draws and users vary at once; taking users alone would miss most often."""
    inside, narrow = 0, 0
    for seed in range(400):
        result = crossed_interval(*scores(seeds=5, draws=5, sd=(0.3, 0.3, 1.0, 1.0), mean=0.4, seed=seed))
        inside += result["low"] < 0.4 < result["high"]
        narrow += abs(result["value"] - 0.4) < 1.96 * result["error_users"]
        assert (result["p_student"] < 0.05) == (result["low"] > 0 or result["high"] < 0)
    assert 0.92 <= inside / 400 <= 0.99
    assert narrow / 400 < 0.85


def test_values_without_any_spread_have_no_width():
    result = crossed_interval(np.ones((2, 2, 5)), np.arange(5))
    assert result["low"] == result["value"] == result["high"] == 1 and result["p_student"] == 0
    assert crossed_interval(np.zeros((2, 2, 5)), np.arange(5))["p_student"] == 1


def test_mcnemar_is_the_binomial_of_the_questions_that_differ():
    first = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0], bool)
    second = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(first, second) == pytest.approx(2 * sum(comb(8, k) for k in (0, 1)) / 2**8)
    assert mcnemar(first, first) == 1


def test_the_test_over_users_counts_all_signs():
    difference, users = np.array([0.5, 0.5, 1.0, -1.0, 2.0, 0.0]), np.array([0, 0, 1, 2, 3, 4])
    sums = np.array([1.0, 1.0, -1.0, 2.0])
    signed = [np.dot(signs, sums) for signs in product((1, -1), repeat=4)]
    assert sign_flip_test(difference, users) == pytest.approx(np.mean(np.abs(signed) >= abs(sums.sum()) - 1e-9))
    assert sign_flip_test(np.zeros(4), np.arange(4)) == 1


@pytest.mark.slow
def test_the_sign_flip_test_has_its_level_without_a_difference():
    rejected = [
        sign_flip_test(np.random.default_rng(seed).normal(size=30), np.arange(30)) < 0.05 for seed in range(200)
    ]
    assert 0.01 < np.mean(rejected) < 0.1


def test_holm_steps_down():
    p = pd.Series({"b": 0.01, "d": 0.04, "c": 0.03, "a": 0.005})
    expected = pd.Series({"b": 0.03, "d": 0.06, "c": 0.06, "a": 0.02})
    pd.testing.assert_series_equal(holm(p), expected)
    assert holm(pd.Series([0.6, 0.7])).max() == 1


def test_runs_are_paired_in_order_and_a_single_run_with_all():
    rng = np.random.default_rng(1)
    first, second, users = rng.random((3, 2, 40)) < 0.7, rng.random((3, 2, 40)) < 0.4, np.arange(40)
    result = paired_comparison(first, second, users)
    interval = crossed_interval(first.astype(float) - second, users)
    assert result.items() >= interval.items()
    exact = [mcnemar(first[s, d], second[s, d]) for s in range(3) for d in range(2)]
    assert result["mcnemar_least"] == min(exact) and result["mcnemar_largest"] == max(exact)
    assert result["mcnemar_median"] == pytest.approx(np.median(exact))
    single = paired_comparison(first, second[:1], users)
    assert single["seeds"] == 3 and single["value"] == pytest.approx(first.mean() - second[0].mean())
    assert result["p"] < 0.01


# ---------------------------------------------------------------- the bootstrap over users


def uneven(users=40, seed=0, ours=0.5, theirs=0.4):
    """Hits (1, 1, n) of two systems; users have 1 to 12 windows each, and different shares of hits."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 13, users))
    shift = (0.35 * rng.choice([-1, 1], users))[user]  # one system is better for half of the users
    chances = (ours + shift, theirs - shift)
    return *(rng.random((1, 1, len(user))) < chance for chance in chances), user


def test_the_bootstrap_draws_users_with_all_their_windows():
    first, second, users = uneven()
    result = paired_comparison(first, second, users)
    difference, rng, means = first[0, 0].astype(float) - second[0, 0], np.random.default_rng(5), []
    for _ in range(4000):
        drawn = rng.integers(40, size=40)
        means.append(np.concatenate([difference[users == user] for user in drawn]).mean())
    sums, counts = np.bincount(users, difference), np.bincount(users)
    scipys = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, vectorized=True, method="percentile",
        rng=np.random.default_rng(6),
    ).confidence_interval  # fmt: skip
    ends, width = (result["bootstrap_low"], result["bootstrap_high"]), np.ptp(np.quantile(means, (0.025, 0.975)))
    assert ends == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.05 * width)
    assert ends == pytest.approx(scipys, abs=0.05 * width)


def test_the_bootstrap_is_of_the_mean_over_runs_and_draws_and_the_same_for_a_seed():
    rng = np.random.default_rng(1)
    first, second, users = rng.random((3, 2, 60)) < 0.7, rng.random((3, 2, 60)) < 0.4, np.repeat(np.arange(20), 3)
    result = paired_comparison(first, second, users)
    again = paired_comparison(
        np.repeat(first, 2, axis=1), np.repeat(second, 2, axis=1), users
    )  # each draw twice: the same mean
    ends = ("bootstrap_low", "bootstrap_high")
    assert [result[end] for end in ends] == pytest.approx([again[end] for end in ends])
    assert result["bootstrap_low"] < result["value"] < result["bootstrap_high"]


def test_equal_systems_have_no_difference_to_resample():
    first, _, users = uneven()
    result = paired_comparison(first, first, users)
    assert (result["bootstrap_low"], result["bootstrap_high"]) == (0, 0)


@pytest.mark.slow
def test_the_bootstrap_has_its_coverage(monkeypatch):
    """Windows of a user are alike here: taking them as independent would miss it far more often."""
    monkeypatch.setattr(comparisons, "PERMUTATIONS", 9)  # of the test, which this does not look at
    inside, narrow = 0, 0
    for seed in range(200):
        first, second, users = uneven(users=60, seed=seed)
        result = paired_comparison(first, second, users)
        inside += result["bootstrap_low"] < 0.1 < result["bootstrap_high"]
        difference = first[0, 0].astype(float) - second[0, 0]
        narrow += abs(difference.mean() - 0.1) < 1.96 * stats.sem(difference)
    assert 0.91 <= inside / 200 <= 0.98
    assert narrow / 200 < 0.8
