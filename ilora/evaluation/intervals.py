"""95% intervals of means and of paired differences, with users as independent units."""

import numpy as np
import pandas as pd
from scipy import stats

from ilora.errors import UserError

QUESTION_COLUMNS = ["user", "position", "target", "candidates"]  # of outcomes: they identify a question
RESAMPLES = 2000


def interval(values: np.ndarray, users: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of values (n,) with a 95% interval: Wilson's for hits of one question per user, else a bootstrap."""
    values, users = np.asarray(values, float), np.asarray(users)
    mean, n, clusters = float(values.mean()), len(values), len(np.unique(users))
    # A bootstrap has no width if all values are 0, or all are 1: then Wilson's interval counts each user once.
    if mean in (0, 1) or (clusters == n and np.isin(values, (0, 1)).all()):
        low, high = stats.binomtest(round(mean * clusters), clusters).proportion_ci(method="wilson")
    else:
        low, high = np.quantile(resampled_means(values, users, seed), (0.025, 0.975))
    return {"value": mean, "low": float(low), "high": float(high), "n": n, "users": clusters}


def difference(first: pd.DataFrame, second: pd.DataFrame, column: str = "hit") -> dict[str, float]:
    """Mean difference `first` - `second` with a 95% interval from resampled users; ValueError for other questions."""
    ids = [outcomes.filter(QUESTION_COLUMNS).reset_index(drop=True) for outcomes in (first, second)]
    if not ids[0].equals(ids[1]):
        raise ValueError("the outcomes are of different questions: evaluate both systems on the same Questions")
    change = first[column].to_numpy(float) - second[column].to_numpy(float)
    low, high = np.quantile(resampled_means(change, first["user"].to_numpy(), seed=0), (0.025, 0.975))
    return {"value": float(change.mean()), "low": float(low), "high": float(high), "n": len(change)}


def resampled_means(values: np.ndarray, users: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES,) means of values (n,) over users sampled with replacement; UserError for no or infinite values."""
    if not len(values) or (wrong := np.sum(~np.isfinite(values))):
        reason = f"{wrong} of {len(values)} values are NaN or infinite" if len(values) else "there is no value"
        raise UserError(f"these values have no mean ({reason}): check the system that they come from")
    _, group = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)  # (RESAMPLES, users)
    return weights @ sums / (weights @ counts)
