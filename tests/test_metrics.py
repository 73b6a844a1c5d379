"""HitRatio, ValidRatio and NDCG of outcomes, and HitRatio@1 averaged over all samples of candidates."""

import itertools

import numpy as np
import pytest
import torch
from test_evaluation import make_outcomes
from test_recommenders import ITEMS, dataset, make

from ilora.data import candidates, sequences
from ilora.errors import UserError
from ilora.evaluation import compute_metrics, expected_hit_ratio, hit_ratios
from ilora.recommenders import GRU4Rec, SASRec


def test_hit_ratio_of_all_and_of_valid_answers():
    """LLaRA's row for MovieLens: 42 of 95 right, 92 of 95 valid."""
    hit = np.arange(95) < 42
    metrics = compute_metrics(make_outcomes(hit, valid=np.arange(95) < 92))
    assert round(metrics["hit_ratio"]["value"], 4) == 0.4421 and metrics["hit_ratio"]["n"] == 95
    assert round(metrics["valid_ratio"]["value"], 4) == 0.9684
    assert metrics["hit_ratio_of_valid"]["value"] == pytest.approx(42 / 92)
    assert metrics["hit_ratio_of_valid"]["n"] == 92


def test_without_a_valid_answer_there_is_no_ratio_of_valid_answers():
    metrics = compute_metrics(make_outcomes(np.zeros(10, bool), valid=np.zeros(10, bool)))
    assert "hit_ratio_of_valid" not in metrics
    assert metrics["valid_ratio"]["value"] == metrics["hit_ratio"]["value"] == 0


def test_ranking_metrics():
    rank = np.array([1, 2, 5, 6, 10, 11, 20, 1])
    metrics = {name: result["value"] for name, result in compute_metrics(make_outcomes(rank == 1, rank=rank)).items()}
    assert metrics["rank_hit_ratio@1"] == 2 / 8
    assert metrics["rank_hit_ratio@5"] == 4 / 8
    assert metrics["rank_hit_ratio@10"] == 6 / 8
    gains = {place: 1 / np.log2(1 + place) for place in (1, 2, 5, 6, 10)}
    assert metrics["rank_ndcg@5"] == pytest.approx((2 * gains[1] + gains[2] + gains[5]) / 8)
    assert metrics["rank_ndcg@10"] == pytest.approx((gains[1] + sum(gains.values())) / 8)


def test_expected_hit_ratio_equals_the_mean_over_all_samples():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, (30, 9)).astype(float)  # many ties
    history = np.array([[9, 0, 1], [9, 9, 2]]).repeat(15, axis=0)
    target = random.integers(3, 9, 30)
    expected = []
    for row in range(30):
        free = [i for i in range(9) if i not in history[row] and i != target[row]]
        hits = []
        for others in itertools.combinations(free, 3):
            values, target_score = scores[row, list(others)], scores[row, target[row]]
            hits.append(0 if (values > target_score).any() else 1 / (1 + (values == target_score).sum()))
        expected.append(np.mean(hits))
    np.testing.assert_allclose(expected_hit_ratio(scores, history, target, size=4), expected, atol=1e-12)


def test_expected_hit_ratio_is_the_mean_over_sampled_candidates():
    model, rows = make(SASRec), sequences(dataset(), "train", window=6)
    history = torch.from_numpy(rows.history)
    hits = []
    for seed in range(100):
        sampled = candidates(rows, ITEMS, seed)
        best = model.score_all(history).gather(1, torch.from_numpy(sampled)).argmax(1).numpy()
        hits.append(np.take_along_axis(sampled, best[:, None], 1)[:, 0] == rows.target)
    expected, observed = hit_ratios(model, rows), np.mean(hits, axis=0)
    deviation = np.sqrt((expected * (1 - expected)).sum() / 100) / len(rows)
    assert abs(expected.mean() - observed.mean()) < 4 * deviation


@pytest.mark.parametrize(("value", "system"), [(np.nan, "SASRec"), (np.inf, "SASRec"), (np.nan, "GRU4Rec")])
def test_nan_and_infinite_scores_are_refused_with_the_systems_name(value, system):
    model, rows = make({"SASRec": SASRec, "GRU4Rec": GRU4Rec}[system]), sequences(dataset(), "train", window=6)
    with torch.no_grad():
        next(iter(model.state_dict().values()))[3] = value
    with pytest.raises(UserError, match=f"{system} gives .* scores that are NaN or infinite"):
        hit_ratios(model, rows)


def test_too_few_items_for_candidates_are_named():
    history, target = np.array([[*range(5)], [*range(5, 10)]]), np.array([10, 11])
    np.testing.assert_allclose(expected_hit_ratio(np.zeros((2, 25)), history, target), 1 / 20)
    with pytest.raises(UserError, match="histories leave 18 items for 19 candidates: add items"):
        expected_hit_ratio(np.zeros((2, 24)), history, target)


def test_a_score_of_minus_infinity_ranks_last():
    scores = np.arange(30.0)[None]
    scores[0, 29] = -np.inf
    assert expected_hit_ratio(scores, np.array([[0]]), np.array([28])) == 1
    with pytest.raises(UserError, match=r"of shape \(1, 30\), not \(2, 30\)"):
        expected_hit_ratio(scores, np.array([[0], [1]]), np.array([28, 28]))
