import tracemalloc
from collections import deque

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ilora import evaluation
from ilora.data import Questions, Sequences
from ilora.errors import UserError
from ilora.evaluation import NO_ANSWER, ask, choose, difference, evaluate, interval, intervals, metrics
from ilora.recommenders import Popularity

ITEMS = 50


def questions(rows=40, users=None, seed=0):
    """Questions about random histories; with `users` several windows of each."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(ITEMS)[:6] for _ in range(rows)])
    user = np.arange(rows) if users is None else np.arange(rows) % users
    sequences = Sequences(user, np.full(rows, 5), drawn[:, :5], np.full(rows, 5), drawn[:, 5])
    return Questions(sequences, ITEMS, seed=1)


def outcomes(hit, valid=None, rank=None, user=None):
    """A table of outcomes as `ask` makes it."""
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


# ---------------------------------------------------------------- the two definitions of HitRatio@1


def test_hit_ratio_of_all_and_of_valid_answers():
    """LLaRA's MovieLens row: 42 of 95 right, 92 of 95 valid; and the released code's reading of the same."""
    hit = np.arange(95) < 42
    found = metrics(outcomes(hit, valid=np.arange(95) < 92))
    assert round(found["hit_ratio"]["value"], 4) == 0.4421 and found["hit_ratio"]["n"] == 95
    assert round(found["valid_ratio"]["value"], 4) == 0.9684
    assert found["hit_ratio_of_valid"]["value"] == pytest.approx(42 / 92)
    assert found["hit_ratio_of_valid"]["n"] == 92


def test_without_a_valid_answer_there_is_no_ratio_of_valid_answers():
    found = metrics(outcomes(np.zeros(10, bool), valid=np.zeros(10, bool)))
    assert "hit_ratio_of_valid" not in found
    assert found["valid_ratio"]["value"] == found["hit_ratio"]["value"] == 0


def test_ranking_metrics():
    rank = np.array([1, 2, 5, 6, 10, 11, 20, 1])
    found = {name: report["value"] for name, report in metrics(outcomes(rank == 1, rank=rank)).items()}
    assert found["rank_hit_ratio@1"] == 2 / 8
    assert found["rank_hit_ratio@5"] == 4 / 8
    assert found["rank_hit_ratio@10"] == 6 / 8
    gains = {place: 1 / np.log2(1 + place) for place in (1, 2, 5, 6, 10)}
    assert found["rank_ndcg@5"] == pytest.approx((2 * gains[1] + gains[2] + gains[5]) / 8)
    assert found["rank_ndcg@10"] == pytest.approx((gains[1] + sum(gains.values())) / 8)


# ---------------------------------------------------------------- ranks and answers


def test_rank_counts_the_better_and_the_earlier_of_the_equal():
    scores = np.array([[3.0, 1, 2, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 5, 5, 4]])
    target = np.array([3, 0, 3, 2])
    is_target = np.arange(4)[None] == target[:, None]
    rank = evaluate._rank(scores, is_target)
    assert rank.tolist() == [4, 1, 4, 2]
    np.testing.assert_array_equal(rank == 1, scores.argmax(1) == target)


def test_ties_favour_nobody_on_average():
    asked = questions(rows=4000)
    rank = choose(asked, np.zeros((4000, 20)))["rank"]
    assert stats.chisquare(np.bincount(rank, minlength=21)[1:]).pvalue > 0.001


def test_choose_answers_with_the_highest_score():
    asked = questions()
    scores = np.random.default_rng(0).random((40, 20))
    found = choose(asked, scores)
    for row in range(40):
        _, candidates, target = asked[row]
        order = candidates[np.argsort(-scores[row])]
        assert found["answer"][row] == order[0]
        assert found["rank"][row] == list(order).index(target) + 1
        assert found["hit"][row] == (order[0] == target)
    assert found["valid"].all()


def test_a_recommender_that_only_ranks_answers_with_the_first_ranked():
    asked = questions(users=8)
    popularity = Popularity(ITEMS).train()
    popularity.counts += torch.randperm(ITEMS)
    found = ask(popularity, asked, batch_size=16)
    assert not popularity.training
    scores = popularity.counts.numpy()[asked.candidates]
    np.testing.assert_array_equal(found["answer"], asked.candidates[np.arange(40), scores.argmax(1)])
    pd.testing.assert_frame_equal(found, choose(asked, scores))
    np.testing.assert_array_equal(found["user"], asked.sequences.user)
    assert found["valid"].all()


class Writer:
    """Knows item `target`, writes nothing valid for odd targets; it can only write, as a chat model."""

    def generate(self, rows):
        return [None if target % 2 else list(candidates).index(target) for _, candidates, target in rows]


class Oracle(Writer):
    """Stands for a LanguageRecommender: it ranks too."""

    def __init__(self):
        self.sizes = []

    def length(self, row):
        return int(row[0][0])  # any order that is not that of the questions

    def rank(self, rows):
        self.sizes.append(len(rows))
        return torch.tensor(np.array([-np.abs(candidates - target + 0.4) for _, candidates, target in rows]))

    def answer(self, rows):
        return self.rank(rows), self.generate(rows)


def test_ask_returns_outcomes_in_the_order_of_the_questions():
    asked, oracle = questions(), Oracle()
    found = ask(oracle, asked, batch_size=16)
    assert oracle.sizes == [16, 16, 8]
    target = asked.sequences.target
    np.testing.assert_array_equal(found["target"], target)
    np.testing.assert_array_equal(found["user"], asked.sequences.user)
    np.testing.assert_array_equal(found["answer"], np.where(target % 2, NO_ANSWER, target))
    np.testing.assert_array_equal(found["valid"], target % 2 == 0)
    np.testing.assert_array_equal(found["hit"], target % 2 == 0)
    assert (found["rank"] == 1).all()


def test_ask_without_writing_answers_with_the_first_ranked():
    asked, oracle = questions(), Oracle()
    oracle.generate = None
    found = ask(oracle, asked, write=False)
    assert found["hit"].all() and found["valid"].all()
    np.testing.assert_array_equal(found["hit"], found["rank"] == 1)


def test_questions_of_like_length_are_asked_together(monkeypatch):
    monkeypatch.setattr(evaluate, "SORTED", 24)
    asked, oracle, seen = questions(), Oracle(), []
    plain = oracle.rank
    oracle.rank = lambda rows: seen.append([oracle.length(row) for row in rows]) or plain(rows)
    found = ask(oracle, asked, batch_size=10)
    assert [len(lengths) for lengths in seen] == [10, 10, 4, 10, 6]  # 24 of the 40 sorted, then the others
    for window in (seen[:3], seen[3:]):
        lengths = [length for batch in window for length in batch]
        assert lengths == sorted(lengths)
    np.testing.assert_array_equal(found["target"], asked.sequences.target)
    assert (found["rank"] == 1).all()


def test_memory_of_asking_does_not_grow_with_the_questions(monkeypatch):
    """But for an answer and a rank each; a question's own row takes some hundred bytes."""
    monkeypatch.setattr(evaluate, "SORTED", 100)
    peaks = []
    monkeypatch.setattr(evaluate, "_outcomes", lambda *_: peaks.append(tracemalloc.get_traced_memory()[1]))
    for rows in (200, 200, 2200):  # the first makes what is made once
        asked, oracle = questions(rows), Oracle()
        oracle.sizes = deque(maxlen=1)
        tracemalloc.start()
        ask(oracle, asked)
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 32 * 2000


def test_a_system_that_only_writes_has_no_rank_and_no_metrics_of_it():
    asked = questions()
    written, full = ask(Writer(), asked, batch_size=16), ask(Oracle(), asked)
    pd.testing.assert_frame_equal(written, full.drop(columns="rank"))
    assert metrics(written) == {name: row for name, row in metrics(full).items() if not name.startswith("rank")}
    systems = {"chat": written, "model": full}
    assert evaluation.table(systems)["n"].tolist() == [40, 40]
    assert list(evaluation.table(systems, "rank_hit_ratio@1").index) == ["model"]
    assert evaluation.summary(systems).loc["chat", "rank_ndcg@10"] == "-"
    assert difference(written, full)["value"] == 0
    with pytest.raises(ValueError, match="Writer can only write"):
        ask(Writer(), asked, write=False)


# ---------------------------------------------------------------- what no system may answer


class Broken:
    """Scores of 0, one of them changed, and the first column as the answer."""

    def __init__(self, value=0.0, answer=0, short=False):
        self.value, self.column, self.short = value, answer, short

    def scores(self, rows):
        scores = torch.zeros(len(rows), 20 - self.short)
        scores[-1, 3] = self.value
        return scores

    def columns(self, rows):
        return [self.column] * (len(rows) - self.short)


class Ranks(Broken):
    rank = Broken.scores


class Writes(Broken):
    generate = Broken.columns


class Both(Ranks, Writes):
    pass


class AtOnce(Both):
    """Ranks and writes together."""

    def answer(self, rows):
        return self.scores(rows), [0] * len(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [Ranks, Both, AtOnce])
def test_scores_that_are_not_numbers_are_refused(kind, value):
    with pytest.raises(UserError, match=f"{kind.__name__} gives 1 of 640 scores that are NaN or infinite"):
        ask(kind(value=value), questions())
    assert ask(kind(value=-np.inf), questions())["rank"].between(1, 20).all()


@pytest.mark.parametrize("kind", [Ranks, Writes, Both])
def test_scores_and_answers_of_another_number_are_refused(kind):
    message = "answers to 32 questions" if kind is Writes else r"of shape \(32, 19\), not \(32, 20\)"
    with pytest.raises(UserError, match=f"{kind.__name__} gives .*{message}"):
        ask(kind(short=True), questions())


@pytest.mark.parametrize("answer", [-1, 20, 0.0, np.nan, "0"])
def test_answers_that_no_candidate_has_are_refused(answer):
    with pytest.raises(UserError, match=r"Writes answers .*: give the column of a candidate, 0 to 19, or None"):
        ask(Writes(answer=answer), questions())
    assert not ask(Writes(answer=None), questions())["valid"].any()
    assert ask(Writes(answer=np.int64(19)), questions())["valid"].all()


def test_given_scores_are_checked_too():
    asked = questions()
    with pytest.raises(UserError, match="a system gives 20 of 800 scores that are NaN"):
        choose(asked, np.where(np.arange(40)[:, None] == 7, np.nan, np.zeros((40, 20))))
    with pytest.raises(UserError, match="of shape"):
        choose(asked, np.zeros((40, 19)))
