"""HitRatio@1 over all draws of candidates: what one draw of 19 others leaves to chance is averaged exactly."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ilora.data.dataset import CANDIDATES
from ilora.data.windows import Sequences
from ilora.errors import UserError


class Recommender(Protocol):
    """A torch module that scores all items as the next one: (batch, window) item ids -> (batch, n_items)."""

    device: torch.device

    def eval(self) -> object: ...

    def score_all(self, history: Tensor) -> Tensor: ...


def check_scores(scores: np.ndarray, shape: tuple[int, int], system: str) -> np.ndarray:
    """Scores (questions, items) as they are; -inf is one, and puts an item last.

    Raises UserError, naming the system, for another shape, for inf, and for NaN, which no score is greater than: a
    target with NaN would rank first.
    """
    scores = np.asarray(scores)
    if scores.shape != shape:
        raise UserError(f"{system} gives scores of shape {scores.shape}, not {shape}: one for each item offered")
    if wrong := int((np.isnan(scores) | np.isposinf(scores)).sum()):
        raise UserError(
            f"{system} gives {wrong} of {scores.size} scores that are NaN or infinite: its weights or inputs are "
            "broken, train it again, at a lower learning rate if need be"
        )
    return scores


def expected_hit_ratio(
    scores: np.ndarray, history: np.ndarray, target: np.ndarray, size: int = CANDIDATES, system: str = "the system"
) -> np.ndarray:
    """Each row's HitRatio@1 over all draws of candidates: how probably the target scores highest of `size`.

    scores (rows, n_items), history (rows, window), target (rows,) -> (rows,). The others are drawn as in
    `data.candidates`: distinct, neither in the history nor the target; a tie is won by lot. Exact: with m
    items to draw from, `better` of them above the target and `ties` equal to it, the mean over j = 0..ties
    of C(m - better - j, size - 1) / C(m, size - 1), two terms by the hockey-stick identity.
    Raises UserError for scores that `check_scores` refuses, naming the `system`.
    """
    scores = check_scores(scores, (len(history), scores.shape[-1]), system)
    n_items, row = scores.shape[1], np.arange(len(scores))
    free = np.ones((len(scores), n_items + 1), dtype=bool)  # the last column is padding
    free[row[:, None], history] = False
    free[row, target] = False
    free = free[:, :n_items]
    own = scores[row, target][:, None]
    m, better, ties = free.sum(1), (free & (scores > own)).sum(1), (free & (scores == own)).sum(1)

    def term(x: np.ndarray) -> np.ndarray:  # C(x, size) / C(m, size - 1)
        factors = [np.maximum(x - 1 - j, 0) / (m - j) for j in range(size - 1)]
        return x / size * np.prod(factors, axis=0)

    return (term(m - better + 1) - term(m - better - ties)) / (ties + 1)


@torch.no_grad()
def hit_ratios(
    recommender: Recommender, sequences: Sequences, size: int = CANDIDATES, batch_size: int = 512
) -> np.ndarray:
    """`expected_hit_ratio` of a recommender for each sequence, (n,)."""
    recommender.eval()
    parts = []
    for start in range(0, len(sequences), batch_size):
        part = sequences.take(slice(start, start + batch_size))
        scores = recommender.score_all(torch.from_numpy(part.history).to(recommender.device)).cpu().numpy()
        parts.append(expected_hit_ratio(scores, part.history, part.target, size, type(recommender).__name__))
    return np.concatenate(parts)
