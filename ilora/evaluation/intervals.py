"""Intervals and tests for a table of systems: how precise a mean is, and whether two systems differ.

values  (seeds, draws, n)  a score per training seed, draw of the candidates and question: 1 for a right answer,
                           or the difference of two systems
users   (n,)               the user of each question; questions of one user are not independent
"""

import numpy as np
import pandas as pd
from scipy import stats

from ilora.errors import UserError

PERMUTATIONS = 9999


def crossed_interval(values: np.ndarray, users: np.ndarray) -> dict[str, float | None]:
    """Mean of values (seeds, draws, n) with a 95 % interval over seeds, draws and users, and the error due to each.

    The variance of the mean is the sum of three variances: over seeds, over draws, and over users as clusters. Each
    contains part of their interaction, so the sum errs on the large side. The interval is Student's, with
    Satterthwaite's degrees of freedom. A source with a single value (one seed) is left out: its error is None.

    Returns value, low, high, n, users, seeds, draws; error_seeds, error_draws, error_users: standard errors of the
    mean; sd_draws: standard deviation of one run's result over draws.
    """
    values = np.asarray(values, float)
    (seeds, draws, n), mean = values.shape, values.mean()
    of_users = _sum_by_user(values.mean((0, 1)) - mean, users)
    sizes = {"seeds": seeds, "draws": draws, "users": len(of_users)}
    variance = {}
    if seeds > 1:
        variance["seeds"] = values.mean((1, 2)).var(ddof=1) / seeds
    if draws > 1:
        variance["draws"] = values.mean((0, 2)).var(ddof=1) / draws
    if len(of_users) > 1:
        variance["users"] = (of_users**2).sum() / n**2 * len(of_users) / (len(of_users) - 1)
    total = sum(variance.values())
    freedom = total**2 / sum(part**2 / (sizes[source] - 1) for source, part in variance.items()) if total else 1
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    errors = {source: float(np.sqrt(variance[source])) if source in variance else None for source in sizes}
    return {
        "value": float(mean), "low": float(mean - half), "high": float(mean + half), "n": n, **sizes,
        **{f"error_{source}": error for source, error in errors.items()},
        "sd_draws": float(np.sqrt(values.mean(2).var(axis=1, ddof=1).mean())) if draws > 1 else None,
    }  # fmt: skip


def _sum_by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums of values (n,) over the questions of each user, (number of users,)."""
    return np.bincount(np.unique(users, return_inverse=True)[1], values)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test for the right answers (n,) of two systems to the same questions."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    either = only_first + only_second
    return float(stats.binomtest(only_first, either).pvalue) if either else 1.0


def sign_flip_test(differences: np.ndarray, users: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of paired differences (n,), flipping the signs of whole users.

    Enumerates all 2^users sign patterns if there are at most PERMUTATIONS, else samples that many.
    """
    sums = _sum_by_user(differences, users)
    sums = sums[sums != 0]
    if len(sums) < 2:  # both signs are equally extreme
        return 1.0
    test = stats.permutation_test(
        (sums,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True,
        batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


def holm(p: pd.Series) -> pd.Series:
    """p values adjusted by Holm's method; rejecting those below 0.05 keeps the familywise error rate at 5 %."""
    ascending = p.sort_values()
    return (ascending * np.arange(len(p), 0, -1)).cummax().clip(upper=1)[p.index]


def paired_comparison(first: np.ndarray, second: np.ndarray, users: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compare the right answers of two systems, (seeds, draws, n) each, to the same questions.

    Runs are paired in order; a single run is paired with every run of the other system. Returns `crossed_interval` of
    the difference; for its mean over seeds and draws, `p` of `sign_flip_test` and bootstrap_low, bootstrap_high, the
    percentile interval of a bootstrap over users (Efron 1979); the median, least and largest p of `mcnemar` over pairs
    of runs and draws.
    """
    first, second = np.broadcast_arrays(first, second)
    differences = first.astype(float) - second
    mean = differences.mean((0, 1))
    low, high = np.quantile(resampled_means(mean, users, seed), (0.025, 0.975))
    pairs = zip(first.reshape(-1, len(mean)), second.reshape(-1, len(mean)), strict=True)
    least, median, largest = np.quantile([mcnemar(*pair) for pair in pairs], (0, 0.5, 1))
    return crossed_interval(differences, users) | {
        "p": sign_flip_test(mean, users, seed), "bootstrap_low": float(low), "bootstrap_high": float(high),
        "mcnemar_median": float(median), "mcnemar_least": float(least), "mcnemar_largest": float(largest),
    }  # fmt: skip


QUESTION = ["user", "position", "target", "candidates"]  # the columns that say what was asked


RESAMPLES = 2000


def interval(values: np.ndarray, users: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of `values` (n,) with a 95 % interval.

    One answer per user, right or wrong: Wilson's interval. Several windows per user, or values between 0 and 1:
    users are drawn with replacement (a cluster bootstrap), because windows of one user are not independent.
    Where all answers are alike a bootstrap has no width: Wilson's interval with each user counted once.
    """
    values, users = np.asarray(values, float), np.asarray(users)
    mean, n, clusters = float(values.mean()), len(values), len(np.unique(users))
    if mean in (0, 1) or (clusters == n and np.isin(values, (0, 1)).all()):
        found = stats.binomtest(round(mean * clusters), clusters).proportion_ci(method="wilson")
        low, high = found.low, found.high
    else:
        low, high = np.quantile(resampled_means(values, users, seed), (0.025, 0.975))
    return {"value": mean, "low": float(low), "high": float(high), "n": n, "users": clusters}


def difference(one: pd.DataFrame, other: pd.DataFrame, column: str = "hit", seed: int = 0) -> dict[str, float]:
    """Mean difference `one` - `other` of a column on the same questions, with a 95 % interval by users.

    Raises ValueError if the questions differ: users, targets and, where the tables hold them, candidates.
    """
    asked = [table[table.columns.intersection(QUESTION)].reset_index(drop=True) for table in (one, other)]
    if not asked[0].equals(asked[1]):
        raise ValueError("the two outcomes answer different questions: ask both with the same Questions")
    change = one[column].to_numpy(float) - other[column].to_numpy(float)
    low, high = np.quantile(resampled_means(change, one["user"].to_numpy(), seed), (0.025, 0.975))
    return {"value": float(change.mean()), "low": float(low), "high": float(high), "n": len(change)}


def resampled_means(values: np.ndarray, users: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,) means of values (n,) over users drawn with replacement, each with all its windows.

    Raises UserError where there are no values, or some are NaN or infinite.
    """
    if not len(values) or not np.isfinite(values).all():
        wrong = f"{np.sum(~np.isfinite(values))} of {len(values)} values are NaN or infinite" if len(values) else "none"
        raise UserError(f"there is no mean of these values ({wrong}): check the system that they are of")
    _, group = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)  # (RESAMPLES, users)
    return weights @ sums / (weights @ counts)
