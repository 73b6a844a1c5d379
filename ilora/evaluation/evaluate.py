"""Evaluation: one row of outcomes per question, and the metrics of a set of outcomes with 95 % intervals.

The paper's HitRatio@1 counts right answers among all questions, the released code's among valid answers. Both
are reported, by name: `hit_ratio` and `hit_ratio_of_valid`. `rank_...` come from ranking the 20 candidates by
likelihood or score, where every answer is valid by construction.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ilora.data.dataset import Dataset
from ilora.data.windows import Questions
from ilora.data.world import make_world
from ilora.errors import UserError
from ilora.evaluation.intervals import QUESTION, difference, interval
from ilora.evaluation.metrics import check_scores

NO_ANSWER = -1


SORTED = 4096  # questions that are sorted by length together


class System(Protocol):
    """What can be asked: it has `rank` or `generate`, or both. A row is one of Questions.

    Optional: `check(questions)`, refuses what it cannot read before any work; `answer(rows)`, the results of `rank` and
    `generate` where both together cost less; `length(row)`, so that rows of like length are asked together.
    """

    def rank(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """(rows, candidates) scores of the candidates."""

    def generate(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> list[int | None]:
        """For each row the column of the candidate that the system names; None for an invalid answer."""


def ask(recommender: System, questions: Questions, batch_size: int = 0, write: bool = True) -> pd.DataFrame:
    """Outcomes of any system, one row a question in the order of `questions`.

    user, position, target, candidates (a digest of them): what was asked; answer: the item that `generate` names,
    NO_ANSWER if invalid; valid, hit; rank: the target's place among the candidates by `rank`, from 1. Without
    `generate`, or with `write=False`, the first-ranked candidate is the answer; without `rank` there is no such column.
    batch_size: questions at once; 0: `at_once`.
    """
    batch_size = batch_size or at_once(recommender)
    writes, ranks = write and hasattr(recommender, "generate"), hasattr(recommender, "rank")
    if not writes and not ranks:
        raise ValueError(f"{type(recommender).__name__} can only write: ask it with write=True")
    if isinstance(recommender, nn.Module):
        recommender.eval()
    if hasattr(recommender, "check"):
        recommender.check(questions)
    answer, place = np.full(len(questions), NO_ANSWER), np.zeros(len(questions), int)
    with tqdm(total=len(questions), unit="question", desc="asking", mininterval=1, delay=1) as bar:
        for index, batch in _batches(recommender, questions, batch_size):
            scores, column = _answers(recommender, batch, ranks, writes)
            if ranks:
                place[index] = _rank(scores, np.array([row[1] == row[2] for row in batch]))
            column = column if writes else scores.argmax(1)
            answer[index] = [NO_ANSWER if c is None else row[1][c] for c, row in zip(column, batch, strict=True)]
            bar.update(len(batch))
    return _outcomes(questions, answer, place if ranks else None)


def at_once(recommender: System) -> int:
    """Questions of a batch: 64 on a GPU, else 32."""
    return 64 if getattr(recommender, "device", torch.device("cpu")).type == "cuda" else 32


def _answers(recommender: System, batch: list, ranks: bool, writes: bool) -> tuple[np.ndarray | None, list | None]:
    """Checked scores of the candidates and the columns named, either only where it is wanted.  Raises UserError."""
    if ranks and writes and hasattr(recommender, "answer"):
        scores, column = recommender.answer(batch)
    else:
        scores = recommender.rank(batch) if ranks else None
        column = recommender.generate(batch) if writes else None
    name, offered = type(recommender).__name__, len(batch[0][1])
    if ranks:
        scores = check_scores(torch.as_tensor(scores).cpu().double().numpy(), (len(batch), offered), name)
    if writes and len(column) != len(batch):
        raise UserError(f"{name} gives {len(column)} answers to {len(batch)} questions: give one, or None, for each")
    for c in column if writes else ():
        if c is not None and not (isinstance(c, Integral) and 0 <= c < offered):
            raise UserError(f"{name} answers {c!r}: give the column of a candidate, 0 to {offered - 1}, or None")
    return scores, column


def _batches(recommender: System, questions: Questions, batch_size: int) -> Iterator[tuple[np.ndarray, list]]:
    """Numbers and rows of questions of like length; sorted within SORTED at a time, which bounds the memory."""
    for first in range(0, len(questions), SORTED):
        rows = [questions[i] for i in range(first, min(first + SORTED, len(questions)))]
        order = np.arange(len(rows))
        if hasattr(recommender, "length"):
            order = np.argsort([recommender.length(row) for row in rows], kind="stable")
        for index in np.split(order, range(batch_size, len(order), batch_size)):
            yield first + index, [rows[i] for i in index]


def choose(questions: Questions, scores: np.ndarray) -> pd.DataFrame:
    """Outcomes of scores (n, candidates).  Raises UserError for scores that `metrics.check_scores` refuses."""
    scores = check_scores(scores, questions.candidates.shape, "a system")
    answer = np.take_along_axis(questions.candidates, scores.argmax(1)[:, None], axis=1)[:, 0]
    rank = _rank(scores, questions.candidates == questions.sequences.target[:, None])
    return _outcomes(questions, answer, rank)


def _rank(scores: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """(n,) place of the target from 1; a tie is lost to candidates in earlier columns, which are random."""
    own = scores[is_target][:, None]
    earlier = np.arange(scores.shape[1])[None] < is_target.argmax(1)[:, None]
    return 1 + ((scores > own) | (scores == own) & earlier).sum(1)


def asked(questions: Questions) -> pd.DataFrame:
    """What is asked: the columns of QUESTION, a row a question."""
    own = questions.sequences
    digest = pd.util.hash_pandas_object(pd.DataFrame(questions.candidates), index=False) % 2**16  # of each row: small
    columns = (own.user, own.position, own.target, digest.astype(np.int64))
    return pd.DataFrame(dict(zip(QUESTION, columns, strict=True)))


def _outcomes(questions: Questions, answer: np.ndarray, rank: np.ndarray | None) -> pd.DataFrame:
    hit = answer == questions.sequences.target
    outcomes = asked(questions).assign(answer=answer, valid=answer != NO_ANSWER, hit=hit)
    return outcomes if rank is None else outcomes.assign(rank=rank)


def metrics(outcomes: pd.DataFrame, seed: int = 0) -> dict[str, dict[str, float]]:
    """name -> {value, low, high, n}: each a mean over sequences with its 95 % interval.

    valid_ratio, hit_ratio (right of all, the paper's), hit_ratio_of_valid (right of valid, the released code's),
    rank_hit_ratio@k and rank_ndcg@k for k = 1, 5, 10, of a system that ranks.
    """
    values = {"valid_ratio": outcomes["valid"], "hit_ratio": outcomes["hit"]}
    for k in (1, 5, 10) if "rank" in outcomes else ():
        rank = outcomes["rank"].to_numpy()
        values[f"rank_hit_ratio@{k}"] = rank <= k
        if k > 1:
            values[f"rank_ndcg@{k}"] = np.where(rank <= k, 1 / np.log2(1 + rank), 0.0)
    report = {name: interval(np.asarray(value, float), outcomes["user"], seed=seed) for name, value in values.items()}
    valid = outcomes[outcomes["valid"]]
    if len(valid):
        report["hit_ratio_of_valid"] = interval(valid["hit"].to_numpy(float), valid["user"], seed=seed)
    return report


def table(systems: dict[str, pd.DataFrame], metric: str = "hit_ratio") -> pd.DataFrame:
    """One row a system that has the metric: its value, low and high, and n; in the order given."""
    rows = {name: metrics(outcomes) for name, outcomes in systems.items()}
    rows = {name: row[metric] for name, row in rows.items() if metric in row}
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=["value", "low", "high", "n"])


def summary(systems: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The table that pages show: for each system its main metrics as "value [low, high]"."""
    names = ["hit_ratio", "valid_ratio", "hit_ratio_of_valid", "rank_hit_ratio@1", "rank_ndcg@10"]
    rows = {system: metrics(outcomes) for system, outcomes in systems.items()}
    table = [[written(row[name]) if name in row else "-" for name in names] for row in rows.values()]
    return pd.DataFrame(table, index=list(rows), columns=names)


def written(found: dict[str, float]) -> str:
    """An interval, or a difference with one, for a reader: "0.523 [0.491, 0.552]"."""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def verdict(systems: dict[str, pd.DataFrame], one: str, other: str) -> str:
    """Which of two systems has the higher HitRatio@1, by their paired difference; titles a figure."""
    found = difference(systems[one], systems[other])
    if found["low"] <= 0 <= found["high"]:
        return f"{one} and {other} cannot be told apart: {written(found)}"
    if found["high"] < 0:
        return verdict(systems, other, one)
    return f"{one} is above {other} by {written(found)}"


def attainable(dataset: Dataset, asked: Questions, conflict: float, users: int, seed: int) -> dict[str, pd.DataFrame]:
    """Outcomes of the best possible predictors in the world, by what they know; empty for real data."""
    if dataset.name != "world":
        return {}
    world = make_world(users=users, conflict=conflict, seed=seed)
    history, offered = asked.sequences.history, asked.candidates
    group = world.groups[asked.sequences.user]
    best = {
        f"best, knowing {what}": world.best_choice(history, offered, what, group)
        for what in ("nothing", "history", "group")
    }
    return {name: choose(asked, np.eye(offered.shape[1])[column]) for name, column in best.items()}
