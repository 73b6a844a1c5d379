"""How sure a table is: where the spread of a mean comes from, and whether two systems differ.

    values  (seeds, draws, n)  what a system made of n sequences: 1 for a right answer, or a difference of two systems,
                               for each seed of its training and each draw of the candidates
    users   (n,)               whose sequences they are; windows of one user are not independent

Three things were drawn by lot: the seed, the candidates and the users. Each is given its own share of the uncertainty,
so that a reader sees which one more work would remove: more runs, more draws, or more users.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from ilora.evaluation import resampled_means

PERMUTATIONS = 9999


def spread(values: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Mean of values (seeds, draws, n) with a 95 % interval over seeds, draws and users, and its parts.

    The variance of the mean is the sum of three: of the means of seeds over the number of seeds, likewise of draws, and
    that of a mean over clusters for users. Each holds its share of what seeds, draws and users do together, so the sum
    is rather too large than too small. Student's t with Satterthwaite's degrees of freedom. A part of which there is
    one alone (one seed) is not known and is left out: its standard error is None.

    Returns value, low, high, n, users, seeds, draws; error_seeds, error_draws, error_users: standard errors of the
    mean; sd_draws: how much another draw of candidates moves the result of one run.
    """
    values, users = np.asarray(values, float), np.asarray(users)
    mean = values.mean()
    by_user = _by_user(values.mean((0, 1)) - mean, users)
    by_seed, by_draw = values.mean((1, 2)), values.mean((0, 2))
    clusters = len(by_user)
    variance = {
        "seeds": _variance_of_mean(by_seed),
        "draws": _variance_of_mean(by_draw),
        "users": (by_user**2).sum() / values.shape[2] ** 2 * clusters / (clusters - 1) if clusters > 1 else None,
    }
    freedom = {"seeds": len(by_seed) - 1, "draws": len(by_draw) - 1, "users": clusters - 1}
    known = {part: value for part, value in variance.items() if value}  # neither None nor 0
    whole = sum(known.values())
    half = 0.0
    if known:
        degrees = whole**2 / sum(value**2 / freedom[part] for part, value in known.items())
        half = stats.t.ppf(0.975, degrees) * np.sqrt(whole)
    found = {"value": mean, "low": mean - half, "high": mean + half, "n": values.shape[2], "users": clusters}
    found |= {"seeds": len(by_seed), "draws": len(by_draw)}
    found |= {f"error_{part}": None if value is None else np.sqrt(value) for part, value in variance.items()}
    found["sd_draws"] = np.sqrt(values.mean(2).var(axis=1, ddof=1).mean()) if len(by_draw) > 1 else None
    return {name: value if value is None or isinstance(value, int) else float(value) for name, value in found.items()}


def _variance_of_mean(values: np.ndarray) -> float | None:
    return values.var(ddof=1) / len(values) if len(values) > 1 else None


def _by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """(n,) -> (number of users,): each one's sum."""
    return np.bincount(np.unique(users, return_inverse=True)[1], values)


def mcnemar(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """McNemar's exact test of two systems' right answers (n,) to the same questions.

    Only questions that one of them alone answered rightly tell them apart: under equality each falls to either side
    with probability 1/2, whatever n is. Returns one_alone, other_alone and the two-sided p.
    """
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    alone = int((one & ~other).sum()), int((other & ~one).sum())
    p = stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
    return {"one_alone": alone[0], "other_alone": alone[1], "p": float(p)}


def user_test(difference: np.ndarray, users: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a paired difference (n,) over users: each user's sum may as well have had the other sign.

    All 2^users signs where these are no more than PERMUTATIONS, else that many at random.
    """
    sums = _by_user(np.asarray(difference, float), np.asarray(users))
    sums = sums[sums != 0]
    if len(sums) < 2:  # one sign is as extreme as the other
        return 1.0
    test = stats.permutation_test(
        (sums,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True,
        batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p values (m,): reject those below 0.05; at most 5 % of tables then hold a false one."""
    p = np.asarray(p, float)
    order = p.argsort()
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def compare(one: np.ndarray, other: np.ndarray, users: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Right answers of two systems, (seeds, draws, n) each, to the same questions.

    Runs are paired seed with seed, as many as both have; a system that is not trained has one run, which meets every
    run of the other. Returns `spread` of the difference; of its mean over seeds and draws, `p` of `user_test` and
    bootstrap_low, bootstrap_high, the percentile interval of a paired bootstrap over users (Efron 1979), which a user
    enters with all windows; of McNemar's p, one for each pair of runs and draw, the median and both ends.
    """
    seeds = (max if 1 in (len(one), len(other)) else min)(len(one), len(other))
    one, other = np.broadcast_arrays(one[:seeds], other[:seeds])
    difference = one.astype(float) - other.astype(float)
    mean = difference.mean((0, 1))
    found = spread(difference, users) | {"p": user_test(mean, users, seed)}
    ends = np.quantile(resampled_means(mean, users, seed), (0.025, 0.975))
    found |= dict(zip(("bootstrap_low", "bootstrap_high"), ends.tolist(), strict=True))
    pairs = zip(one.reshape(-1, one.shape[-1]), other.reshape(-1, one.shape[-1]), strict=True)
    low, middle, high = np.quantile([mcnemar(*pair)["p"] for pair in pairs], (0, 0.5, 1))
    return found | {"mcnemar_median": float(middle), "mcnemar_least": float(low), "mcnemar_largest": float(high)}
