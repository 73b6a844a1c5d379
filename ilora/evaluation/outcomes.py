"""Outcomes of a system: one row per question with its answer and the rank of the target."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from ilora.data.windows import Questions, Row
from ilora.devices import memory_for
from ilora.errors import UserError
from ilora.evaluation.metrics import QUESTION_COLUMNS, check_scores

NO_ANSWER, OPEN = -1, -2  # in place of an item or column: an invalid answer, and one that is left to `generate`


class System(Protocol):
    """A system to evaluate: it has `score` or `generate`, or both. A row is an element of Questions.

    Optional: `n_items`; `check(questions)` raises UserError for those that it cannot process; `answer(rows)` returns
    what `score` and `generate` do, or OPEN for rows left to `generate`; `length(row)`: those alike share a batch.
    """

    def score(self, rows: list[Row]) -> torch.Tensor:
        """(rows, candidates) scores of the candidates."""

    def generate(self, rows: list[Row]) -> list[int | None]:
        """For each row the column of the candidate that the system names; None for an invalid answer."""


def evaluate(system: System, questions: Questions, batch_size: int = 0, generate: bool = True) -> pd.DataFrame:
    """Outcomes of a system, one row per question in the same order.  Raises UserError for impossible predictions.

    Columns: those of `question_ids`; answer: the item that `generate` names, or NO_ANSWER if invalid; valid; hit; rank:
    the target's place among the candidates, from 1. Without `generate`, or with `generate=False`, the answer is the
    top-ranked candidate; without `score` there is no column rank. batch_size 0: 64 on a GPU, else 32, or the system's.
    """
    generates, gives_scores = generate and hasattr(system, "generate"), hasattr(system, "score")
    if not generates and not gives_scores:
        raise ValueError(f"{type(system).__name__} can only generate: evaluate it with generate=True")
    if (known := getattr(system, "n_items", questions.n_items)) != questions.n_items:
        raise UserError(f"{type(system).__name__} is of {known} items, not {questions.n_items}: train it on this data")
    getattr(system, "eval", lambda: None)()
    getattr(system, "check", lambda _: None)(questions)
    usual = 64 if torch.device(getattr(system, "device", "cpu")).type == "cuda" else 32
    batch_size = batch_size if batch_size > 0 else min(usual, getattr(system, "batch_size", usual))
    scores, columns = np.zeros(questions.candidates.shape), np.zeros(len(questions), int)
    with tqdm(total=len(questions), unit="question", desc="evaluating", mininterval=1, delay=1) as bar:
        for numbers, rows in batches_by_length(system, questions, batch_size):
            scores[numbers], columns[numbers] = _predict(system, rows, gives_scores, generates)
            bar.update(np.count_nonzero(columns[numbers] != OPEN))
        left = np.flatnonzero(columns == OPEN)
        for numbers, rows in batches_by_length(system, questions.take(left), batch_size):
            columns[left[numbers]] = _predict(system, rows, False, True)[1]
            bar.update(len(rows))
    return _outcomes(questions, columns, scores if gives_scores else None)


def _predict(system: System, rows: list[Row], gives_scores: bool, generates: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the candidates, 0 unless `gives_scores`, and the columns of the answers, both checked."""
    name, shape = type(system).__name__, (len(rows), len(rows[0][1]))
    unnamed = (None, OPEN) if gives_scores and generates and hasattr(system, "answer") else (None,)
    with memory_for(len(rows)):
        if OPEN in unnamed:
            scores, columns = system.answer(rows)
        else:
            scores = system.score(rows) if gives_scores else np.zeros(shape)
            columns = system.generate(rows) if generates else None
    scores = check_scores(torch.as_tensor(scores).cpu().double().numpy(), shape, name)
    columns = (() if columns is None else columns) if generates else scores.argmax(1)  # None: no `return`
    if len(columns) != len(rows):
        raise UserError(f"{name} gives {len(columns)} answers to {len(rows)} questions: give one, or None, for each")
    for column in columns:
        if column not in unnamed and not (isinstance(column, int | np.integer) and 0 <= column < shape[1]):
            raise UserError(f"{name} answers {column!r}: give the column of a candidate, 0 to {shape[1] - 1}, or None")
    return scores, np.array([NO_ANSWER if column is None else column for column in columns])


def batches_by_length(system: System, questions: Questions, batch_size: int) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """Numbers and rows of questions, in batches of similar length if the system has `length`."""
    length = getattr(system, "length", lambda row: 0)
    order = np.argsort(np.fromiter(map(length, questions), int), kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        yield numbers, [questions[i] for i in numbers]


def outcomes_from_scores(questions: Questions, scores: np.ndarray) -> pd.DataFrame:
    """Outcomes of a system with these scores (n, candidates).  Raises UserError as `check_scores` does."""
    scores = check_scores(scores, questions.candidates.shape, "a system")
    return _outcomes(questions, scores.argmax(1), scores)


def question_ids(questions: Questions) -> pd.DataFrame:
    """What identifies each question: user, position, target, and a digest of its candidates."""
    sequences, candidates = questions.sequences, pd.DataFrame(questions.candidates)
    digest = pd.util.hash_pandas_object(candidates, index=False) % 2**16  # small numbers keep result files small
    columns = (sequences.user, sequences.position, sequences.target, digest.astype(np.int64))
    return pd.DataFrame(dict(zip(QUESTION_COLUMNS, columns, strict=True)))


def _outcomes(questions: Questions, columns: np.ndarray, scores: np.ndarray | None) -> pd.DataFrame:
    """Outcomes of answers in these columns (n,) of the candidates, and of their scores (n, candidates) if there are."""
    target, valid = questions.sequences.target, columns != NO_ANSWER
    answer = np.where(valid, questions.candidates[np.arange(len(columns)), columns], NO_ANSWER)
    outcomes = question_ids(questions).assign(answer=answer, valid=valid, hit=answer == target)
    if scores is None:
        return outcomes
    rank = stats.rankdata(-scores, "ordinal", axis=1)  # of equal scores the first column's: their order is random
    return outcomes.assign(rank=rank[questions.candidates == target[:, None]])
