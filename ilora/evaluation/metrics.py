"""Metrics of outcomes and paired differences, with 95% intervals over users; HitRatio@1 over samples of candidates."""

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ilora.data import CANDIDATES, Sequences
from ilora.errors import UserError

QUESTION_COLUMNS = ["user", "position", "target", "candidates"]  # of outcomes: they identify a question
RESAMPLES = 2000


def compute_metrics(outcomes: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Metrics of `evaluate`'s outcomes with 95% intervals: name -> {value, low, high, n, users}."""
    values = {"valid_ratio": outcomes["valid"], "hit_ratio": outcomes["hit"]}  # the paper's HitRatio@1
    for k in (1, 5, 10) if "rank" in outcomes else ():
        rank = outcomes["rank"].to_numpy()
        values[f"rank_hit_ratio@{k}"] = rank <= k
        if k > 1:
            values[f"rank_ndcg@{k}"] = np.where(rank <= k, 1 / np.log2(1 + rank), 0.0)
    metrics = {name: interval(value, outcomes["user"]) for name, value in values.items()}
    valid = outcomes[outcomes["valid"]]
    if len(valid):
        metrics["hit_ratio_of_valid"] = interval(valid["hit"], valid["user"])  # as in the released code
    return metrics


def interval(values: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Mean of values (n,) with a 95% interval: Wilson's for hits of one question per user, else a bootstrap."""
    values, users = np.asarray(values, float), np.asarray(users)
    n, clusters, hits = len(values), len(np.unique(users)), np.isin(values, (0, 1)).all()
    # A bootstrap has no width if all values are 0, or all are 1: then Wilson's interval counts each user once.
    if n and hits and (clusters == n or values.mean() in (0, 1)):
        low, high = stats.binomtest(round(values.mean() * clusters), clusters).proportion_ci(method="wilson")
    else:
        low, high = np.quantile(resampled_means(values, users), (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": n, "users": clusters}


def difference(first: pd.DataFrame, second: pd.DataFrame, column: str = "hit") -> dict[str, float]:
    """Mean difference `first` - `second` with a 95% interval from resampled users; ValueError for other questions."""
    ids = [outcomes.filter(QUESTION_COLUMNS).reset_index(drop=True) for outcomes in (first, second)]
    if not ids[0].equals(ids[1]):
        raise ValueError("the outcomes are of different questions: evaluate both systems on the same Questions")
    change = first[column].to_numpy(float) - second[column].to_numpy(float)
    low, high = np.quantile(resampled_means(change, first["user"]), (0.025, 0.975))
    return {"value": float(change.mean()), "low": float(low), "high": float(high), "n": len(change)}


def resampled_means(values: np.ndarray, users: np.ndarray, seed: int = 0) -> np.ndarray:
    """(RESAMPLES,) means of values (n,) over users sampled with replacement; UserError for no or infinite values."""
    if not len(values) or (wrong := np.sum(~np.isfinite(values))):
        reason = f"{wrong} of {len(values)} values are NaN or infinite" if len(values) else "there is no value"
        raise UserError(f"these values have no mean ({reason}): check the system that they come from")
    _, group = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    weights = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    return weights @ sums / (weights @ counts)  # weights: (RESAMPLES, users)


def check_scores(scores: np.ndarray, shape: tuple[int, int], system: str) -> np.ndarray:
    """Return the scores as float64; UserError for another shape, for inf, and for NaN, which would rank first."""
    scores = np.asarray(scores, float)
    if scores.shape != shape:
        raise UserError(f"{system} gives scores of shape {scores.shape}, not {shape}: one for each item offered")
    if wrong := int((np.isnan(scores) | np.isposinf(scores)).sum()):
        remedy = "train it again, if necessary at a lower learning rate"
        raise UserError(f"{system} gives {wrong} of {scores.size} scores that are NaN or infinite: {remedy}")
    return scores


def expected_hit_ratio(
    scores: np.ndarray, history: np.ndarray, target: np.ndarray, size: int = CANDIDATES, system: str = "the system"
) -> np.ndarray:
    """The probability, for each row, that the target has the highest score of `size` candidates, (rows,).

    scores (rows, n_items), history (rows, window), target (rows,). With m items to sample from, `better` of them above
    the target and `ties` equal to it, it is the mean over j = 0..ties of C(m - better - j, size - 1) / C(m, size - 1),
    by the hockey-stick identity a sum of two terms.  Raises UserError as `check_scores` does, and if m < size - 1.
    """
    scores = check_scores(scores, (len(history), scores.shape[-1]), system)
    free = np.ones((len(scores), scores.shape[1] + 1), dtype=bool)  # the last column is padding
    np.put_along_axis(free, np.column_stack([history, target]), False, axis=1)
    free = free[:, :-1]
    target_score, m = np.take_along_axis(scores, target[:, None], axis=1), free.sum(1)
    if (m < size - 1).any():
        raise UserError(f"histories leave {m.min()} items for {size - 1} candidates: add items or use a smaller window")
    better, ties = (free & (scores > target_score)).sum(1), (free & (scores == target_score)).sum(1)

    def term(x: np.ndarray) -> np.ndarray:  # C(x, size) / C(m, size - 1)
        return x / size * np.prod([np.maximum(x - 1 - j, 0) / (m - j) for j in range(size - 1)], axis=0)

    return (term(m - better + 1) - term(m - better - ties)) / (ties + 1)


@torch.no_grad()
def hit_ratios(recommender: torch.nn.Module, sequences: Sequences) -> np.ndarray:
    """`expected_hit_ratio` of each sequence, (n,), for a recommender with `device` and `score_all(history)`."""
    recommender.eval()
    parts = []
    for start in range(0, len(sequences), 512):
        part = sequences.take(slice(start, start + 512))
        scores = recommender.score_all(torch.from_numpy(part.history).to(recommender.device)).cpu().numpy()
        parts.append(expected_hit_ratio(scores, part.history, part.target, system=type(recommender).__name__))
    return np.concatenate(parts)
