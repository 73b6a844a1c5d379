"""95% intervals of means and of paired differences."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_evaluation import make_outcomes, questions

from ilora.errors import UserError
from ilora.evaluation import difference, interval, metrics, outcomes_from_scores
from ilora.evaluation.metrics import resampled_means


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_for_one_question_per_user(right, n, low, high):
    result = interval(np.arange(n) < right, np.arange(n))
    assert result["value"] == right / n and result["n"] == n
    assert (round(result["low"], 4), round(result["high"], 4)) == (low, high)


def clustered(rng, users=200, windows=15):
    """Hits of users with different hit probabilities, sampled from Beta(2, 3)."""
    rate = np.repeat(rng.beta(2, 3, size=users), windows)
    return (rng.random(users * windows) < rate).astype(float), np.repeat(np.arange(users), windows)


def test_the_cluster_bootstrap_is_as_wide_as_the_spread_of_the_means():
    rng = np.random.default_rng(0)
    means = [clustered(rng)[0].mean() for _ in range(1000)]
    true_width = np.subtract(*np.quantile(means, (0.975, 0.025)))
    results = [interval(*clustered(rng)) for _ in range(10)]
    width = np.mean([result["high"] - result["low"] for result in results])
    assert width == pytest.approx(true_width, rel=0.08)
    independent = 2 * 1.96 * np.sqrt(0.4 * 0.6 / 3000)
    assert width > 1.5 * independent  # windows of one user are not independent


def test_the_interval_has_its_coverage(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    rng = np.random.default_rng(1)
    results = [interval(*clustered(rng, users=60, windows=5)) for _ in range(200)]
    covered = sum(result["low"] <= 0.4 <= result["high"] for result in results)
    assert 0.89 * 200 <= covered <= 0.985 * 200


def test_users_with_more_windows_have_more_weight():
    values, users = np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])
    assert interval(values, users)["value"] == 0.75
    means = resampled_means(values, users, seed=0)
    assert set(np.round(means, 6)) == {1.0, 0.75, 0.0}  # user 0 twice, both, user 1 twice
    assert abs((means == 0.75).mean() - 0.5) < 0.05


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_has_a_width_even_if_all_answers_are_equal(value):
    """A bootstrap of equal values has no width. Wilson's interval, with each user counted once, has."""
    result = interval(np.full(200, value), np.repeat(np.arange(20), 10))
    edge = stats.binomtest(int(20 * value), 20).proportion_ci(method="wilson")
    assert (result["low"], result["high"]) == pytest.approx((edge.low, edge.high))
    assert result["value"] == value and result["n"] == 200 and result["users"] == 20


def test_the_seed_decides_the_bootstrap():
    values, users = clustered(np.random.default_rng(2), users=30, windows=3)
    values *= np.random.default_rng(3).random(len(values))
    means = [list(resampled_means(values, users, seed)) for seed in (1, 1, 2)]
    assert means[0] == means[1] != means[2]


def test_values_between_0_and_1_are_bootstrapped_even_with_one_per_user():
    values = np.linspace(0, 1, 101)
    result = interval(values, np.arange(101))
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(101), rel=0.1)


def test_values_that_are_no_hits_are_bootstrapped_whatever_their_mean():
    values = np.tile([-1.0, 1, 0.5, 1.5], 25)
    for chosen, mean in ((values[values**2 == 1], 0), (values[values % 1 > 0], 1)):
        result = interval(chosen, np.arange(50))
        assert result["value"] == mean and result["low"] < mean < result["high"]


def test_no_value_has_no_mean():
    with pytest.raises(UserError, match="there is no value"):
        interval(np.array([]), np.array([]))


# ---------------------------------------------------------------- differences


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    one = rng.random(500) < 0.5
    other = np.where(rng.random(500) < 0.05, ~one, one)
    result = difference(make_outcomes(one), make_outcomes(other))
    change = one.astype(float) - other
    assert result["value"] == pytest.approx(change.mean()) and result["n"] == 500
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * change.std() / np.sqrt(500), rel=0.1)
    assert result["low"] <= result["value"] <= result["high"]
    swapped = difference(make_outcomes(other), make_outcomes(one))
    assert swapped["value"] == -result["value"]


def test_a_difference_counts_users_not_windows():
    user = np.repeat(np.arange(50), 10)
    change = np.repeat(np.random.default_rng(0).random(50) < 0.3, 10)
    same = make_outcomes(np.zeros(500, bool), user=user)
    result = difference(make_outcomes(change, user=user), same)
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * change.std() / np.sqrt(50), rel=0.15)


def test_a_difference_of_another_column():
    one, other = make_outcomes([1, 0], rank=[1, 4]), make_outcomes([1, 0], rank=[3, 4])
    assert difference(one, other, "rank")["value"] == -1


@pytest.mark.parametrize("column", ["user", "position", "target", "candidates"])
def test_a_difference_refuses_other_questions(column):
    one = make_outcomes([True, False, True])
    with pytest.raises(ValueError, match="different questions"):
        difference(one, one.assign(**{column: [0, 7, 2]}))
    with pytest.raises(ValueError, match="different questions"):
        difference(one, one.iloc[:2])
    with pytest.raises(ValueError, match="different questions"):
        difference(one, one.iloc[::-1])
    assert difference(one, one.set_index(pd.Index([5, 6, 7])))["value"] == 0  # the index does not matter


def test_a_difference_refuses_other_candidates():
    first, second = questions(), questions()
    one = outcomes_from_scores(first, np.zeros((40, 20)))
    assert difference(one, outcomes_from_scores(second, np.ones((40, 20))))["value"] == 0
    second.set_epoch(1)
    with pytest.raises(ValueError, match="different questions"):
        difference(one, outcomes_from_scores(second, np.ones((40, 20))))
    second.set_epoch(0)
    second.candidates = second.candidates[:, ::-1]  # another order breaks ties differently
    with pytest.raises(ValueError, match="different questions"):
        difference(one, outcomes_from_scores(second, np.ones((40, 20))))
    with pytest.raises(ValueError, match="different questions"):  # one lacks the candidates
        difference(one, one.drop(columns="candidates"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_mean_of_nan_or_infinite_values_is_refused(value):
    values, users = np.array([0.0, 0.5, value]), np.arange(3)
    with pytest.raises(UserError, match="1 of 3 values are NaN or infinite"):
        interval(values, users)
    table = pd.DataFrame({"user": users, "hit": values})
    with pytest.raises(UserError, match="1 of 3 values are NaN or infinite"):
        difference(table, table.assign(hit=0.0))
