"""`evaluate`: predictions and ranks of systems, and what no system may return."""

import tracemalloc
from collections import deque

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ilora.data import Questions, Sequences
from ilora.errors import UserError
from ilora.evaluation import NO_ANSWER, OPEN, compute_metrics, difference, evaluate, outcomes, outcomes_from_scores
from ilora.recommenders import Popularity, SASRec

ITEMS = 50


def questions(rows=40, users=None, seed=0):
    """Questions with random histories; `users` of them, or one question per user."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(ITEMS)[:6] for _ in range(rows)])
    user = np.arange(rows) if users is None else np.arange(rows) % users
    sequences = Sequences(user, np.full(rows, 5), items[:, :5], np.full(rows, 5), items[:, 5])
    return Questions(sequences, ITEMS, seed=1)


def make_outcomes(hit, valid=None, rank=None, user=None):
    """Outcomes as `evaluate` returns them."""
    hit = np.asarray(hit, bool)
    valid = hit | (np.ones(len(hit), bool) if valid is None else np.asarray(valid, bool))
    target = np.arange(len(hit))
    table = {
        "user": np.arange(len(hit)) if user is None else user,
        "position": 3,
        "target": target,
        "candidates": 5,
        "answer": np.where(hit, target, np.where(valid, target + 1000, NO_ANSWER)),
        "valid": valid,
        "hit": hit,
        "rank": np.where(hit, 1, 2) if rank is None else rank,
    }
    return pd.DataFrame(table)


# ---------------------------------------------------------------- ranks and predictions


def test_the_rank_counts_higher_scores_and_earlier_equal_scores():
    scores = np.array([[3.0, 1, 2, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 5, 5, 4]])
    target = np.array([3, 0, 3, 2])
    four = questions(rows=4)
    four.candidates = np.where(np.arange(4) == target[:, None], four.sequences.target[:, None], -2)
    rank = outcomes_from_scores(four, scores)["rank"].to_numpy()
    assert rank.tolist() == [4, 1, 4, 2]
    np.testing.assert_array_equal(rank == 1, scores.argmax(1) == target)


@pytest.mark.parametrize("n_items", [ITEMS - 1, ITEMS + 1])
def test_a_system_of_another_data_set_is_refused(n_items):
    with pytest.raises(UserError, match=f"SASRec is of {n_items} items, not {ITEMS}"):
        evaluate(SASRec(n_items), questions())


def test_ties_are_fair_on_average():
    some_questions = questions(rows=4000)
    rank = outcomes_from_scores(some_questions, np.zeros((4000, 20)))["rank"]
    assert stats.chisquare(np.bincount(rank, minlength=21)[1:]).pvalue > 0.001


def test_the_answer_is_the_candidate_with_the_highest_score():
    some_questions = questions()
    scores = np.random.default_rng(0).random((40, 20))
    result = outcomes_from_scores(some_questions, scores)
    for row in range(40):
        _, candidates, target = some_questions[row]
        order = candidates[np.argsort(-scores[row])]
        assert result["answer"][row] == order[0]
        assert result["rank"][row] == list(order).index(target) + 1
        assert result["hit"][row] == (order[0] == target)
    assert result["valid"].all()


def test_the_answer_of_a_system_that_only_scores_is_the_top_ranked():
    some_questions = questions(users=8)
    popularity = Popularity(ITEMS).train()
    popularity.counts += torch.randperm(ITEMS)
    result = evaluate(popularity, some_questions, batch_size=16)
    assert not popularity.training
    scores = popularity.counts.numpy()[some_questions.candidates]
    np.testing.assert_array_equal(result["answer"], some_questions.candidates[np.arange(40), scores.argmax(1)])
    pd.testing.assert_frame_equal(result, outcomes_from_scores(some_questions, scores))
    np.testing.assert_array_equal(result["user"], some_questions.sequences.user)
    assert result["valid"].all()


class Generator:
    """Generates the target if it is even, else an invalid prediction; cannot score, like a chat model."""

    def generate(self, rows):
        return [None if target % 2 else list(candidates).index(target) for _, candidates, target in rows]


class Oracle(Generator):
    """Can score as well, like a LanguageRecommender."""

    def __init__(self):
        self.sizes = []

    def length(self, row):
        return int(row[0][0])  # any order other than that of the questions

    def score(self, rows):
        self.sizes.append(len(rows))
        return torch.tensor(np.array([-np.abs(candidates - target + 0.4) for _, candidates, target in rows]))

    def answer(self, rows):
        return self.score(rows), self.generate(rows)


class Reader(Oracle):
    """Reads some answers off the scores and leaves the others open."""

    def answer(self, rows):
        return self.score(rows), [OPEN if column in (None, 7) else column for column in super().generate(rows)]

    def generate(self, rows):
        self.sizes.append(len(rows))
        return super().generate(rows)


def test_answers_that_are_left_open_are_generated_together_in_the_end():
    some_questions, reader = questions(), Reader()
    result = evaluate(reader, some_questions, batch_size=16)
    pd.testing.assert_frame_equal(result, evaluate(Oracle(), some_questions, batch_size=16))
    assert reader.sizes[:3] == [16, 16, 8] and 16 in reader.sizes[3:]
    assert sum(reader.sizes) < 2 * len(some_questions)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_system_names_its_device_as_torch_accepts_it(device):
    oracle, some_questions = Oracle(), questions()
    oracle.device = device
    pd.testing.assert_frame_equal(evaluate(oracle, some_questions), evaluate(Oracle(), some_questions))


def test_outcomes_are_in_the_order_of_the_questions():
    some_questions, oracle = questions(), Oracle()
    result = evaluate(oracle, some_questions, batch_size=16)
    assert oracle.sizes == [16, 16, 8]
    target = some_questions.sequences.target
    np.testing.assert_array_equal(result["target"], target)
    np.testing.assert_array_equal(result["user"], some_questions.sequences.user)
    np.testing.assert_array_equal(result["answer"], np.where(target % 2, NO_ANSWER, target))
    np.testing.assert_array_equal(result["valid"], target % 2 == 0)
    np.testing.assert_array_equal(result["hit"], target % 2 == 0)
    assert (result["rank"] == 1).all()


def test_without_generation_the_answer_is_the_top_ranked():
    some_questions, oracle = questions(), Oracle()
    oracle.generate = None
    result = evaluate(oracle, some_questions, generate=False)
    assert result["hit"].all() and result["valid"].all()
    np.testing.assert_array_equal(result["hit"], result["rank"] == 1)


def test_questions_of_similar_length_share_a_batch():
    some_questions, oracle, lengths = questions(), Oracle(), []
    plain = oracle.score
    oracle.score = lambda rows: lengths.append([oracle.length(row) for row in rows]) or plain(rows)
    result = evaluate(oracle, some_questions, batch_size=10)
    assert [len(batch) for batch in lengths] == [10, 10, 10, 10]
    assert sum(lengths, []) == sorted(sum(lengths, []))  # noqa: RUF017
    np.testing.assert_array_equal(result["target"], some_questions.sequences.target)
    assert (result["rank"] == 1).all()


def test_memory_does_not_grow_with_the_number_of_questions(monkeypatch):
    """Except for the scores and the prediction of a question, 168 bytes; its row takes some hundred more."""
    peaks = []
    monkeypatch.setattr(outcomes, "_outcomes", lambda *_: peaks.append(tracemalloc.get_traced_memory()[1]))
    for rows in (200, 200, 2200):  # the first run pays for one-time allocations
        some_questions, oracle = questions(rows), Oracle()
        oracle.sizes = deque(maxlen=1)
        tracemalloc.start()
        evaluate(oracle, some_questions)
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 192 * 2000


def test_a_system_that_only_generates_has_no_rank_and_no_ranking_metrics():
    some_questions = questions()
    generated, full = evaluate(Generator(), some_questions, batch_size=16), evaluate(Oracle(), some_questions)
    pd.testing.assert_frame_equal(generated, full.drop(columns="rank"))
    metrics = {name: values for name, values in compute_metrics(full).items() if not name.startswith("rank")}
    assert compute_metrics(generated) == metrics
    assert difference(generated, full)["value"] == 0
    with pytest.raises(ValueError, match="Generator can only generate"):
        evaluate(Generator(), some_questions, generate=False)


# ---------------------------------------------------------------- what no system may return


class Broken:
    """Scores of 0, one of them changed, and the first column as the prediction."""

    def __init__(self, value=0.0, answer=0, short=False):
        self.value, self.column, self.short = value, answer, short

    def scores(self, rows):
        scores = torch.zeros(len(rows), 20 - self.short)
        scores[-1, 3] = self.value
        return scores

    def columns(self, rows):
        return [self.column] * (len(rows) - self.short)


class Scores(Broken):
    score = Broken.scores


class Generates(Broken):
    generate = Broken.columns


class Both(Scores, Generates):
    pass


class Together(Both):
    """Scores and generates together."""

    def answer(self, rows):
        return self.scores(rows), [0] * len(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [Scores, Both, Together])
def test_scores_that_are_not_numbers_are_refused(kind, value):
    with pytest.raises(UserError, match=f"{kind.__name__} gives 1 of 640 scores that are NaN or infinite"):
        evaluate(kind(value=value), questions())
    assert evaluate(kind(value=-np.inf), questions())["rank"].between(1, 20).all()


@pytest.mark.parametrize("kind", [Scores, Generates, Both])
def test_a_wrong_number_of_scores_or_answers_is_refused(kind):
    message = "answers to 32 questions" if kind is Generates else r"of shape \(32, 19\), not \(32, 20\)"
    with pytest.raises(UserError, match=f"{kind.__name__} gives .*{message}"):
        evaluate(kind(short=True), questions())


@pytest.mark.parametrize("answer", [-1, 20, 0.0, np.nan, "0"])
def test_answers_that_are_no_column_of_a_candidate_are_refused(answer):
    with pytest.raises(UserError, match=r"Generates answers .*: give the column of a candidate, 0 to 19, or None"):
        evaluate(Generates(answer=answer), questions())
    if answer == -1:  # `answer` may leave a row open, but that is another number
        together = Together()
        together.answer = lambda rows: (together.score(rows), [answer] * len(rows))
        with pytest.raises(UserError, match="Together answers -1"):
            evaluate(together, questions())
    assert not evaluate(Generates(answer=None), questions())["valid"].any()
    assert evaluate(Generates(answer=np.int64(19)), questions())["valid"].all()


def test_a_batch_size_below_0_is_as_good_as_none():
    pd.testing.assert_frame_equal(evaluate(Oracle(), questions(), batch_size=-1), evaluate(Oracle(), questions()))


def test_a_forgotten_return_is_no_answer():
    silent = Generates(answer=0)
    silent.generate = lambda rows: None
    with pytest.raises(UserError, match="Generates gives 0 answers to 32 questions"):
        evaluate(silent, questions())


def test_outcomes_from_scores_checks_the_scores():
    some_questions = questions()
    with pytest.raises(UserError, match="a system gives 20 of 800 scores that are NaN"):
        outcomes_from_scores(some_questions, np.where(np.arange(40)[:, None] == 7, np.nan, np.zeros((40, 20))))
    with pytest.raises(UserError, match="of shape"):
        outcomes_from_scores(some_questions, np.zeros((40, 19)))
