import itertools

import numpy as np
import pytest
import torch
from test_recommenders import ITEMS, dataset, make

from ilora.data import candidates, sequences
from ilora.errors import UserError
from ilora.evaluation import expected_hit_ratio, hit_ratios
from ilora.recommenders import GRU4Rec, SASRec


def test_expected_hit_ratio_equals_all_draws_written_out():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, (30, 9)).astype(float)  # many ties
    history = np.array([[9, 0, 1], [9, 9, 2]]).repeat(15, axis=0)
    target = random.integers(3, 9, 30)
    expected = []
    for row in range(30):
        free = [i for i in range(9) if i not in history[row] and i != target[row]]
        draws = []
        for others in itertools.combinations(free, 3):
            values, own = scores[row, list(others)], scores[row, target[row]]
            draws.append(0 if (values > own).any() else 1 / (1 + (values == own).sum()))
        expected.append(np.mean(draws))
    np.testing.assert_allclose(expected_hit_ratio(scores, history, target, size=4), expected, atol=1e-12)


def test_expected_hit_ratio_is_the_mean_over_drawn_candidates():
    model, rows = make(SASRec), sequences(dataset(), "train", window=6)
    history = torch.from_numpy(rows.history)
    hits = []
    for seed in range(100):
        offered = candidates(rows, ITEMS, seed)
        best = model.score(history, torch.from_numpy(offered)).argmax(1).numpy()
        hits.append(np.take_along_axis(offered, best[:, None], 1)[:, 0] == rows.target)
    expected, drawn = hit_ratios(model, rows), np.mean(hits, axis=0)
    deviation = np.sqrt((expected * (1 - expected)).sum() / 100) / len(rows)
    assert abs(expected.mean() - drawn.mean()) < 4 * deviation


@pytest.mark.parametrize(("value", "system"), [(np.nan, "SASRec"), (np.inf, "SASRec"), (np.nan, "GRU4Rec")])
def test_scores_that_are_not_numbers_are_refused_by_the_name_of_their_system(value, system):
    model, rows = make({"SASRec": SASRec, "GRU4Rec": GRU4Rec}[system]), sequences(dataset(), "train", window=6)
    with torch.no_grad():
        next(iter(model.state_dict().values()))[3] = value
    with pytest.raises(UserError, match=f"{system} gives .* scores that are NaN or infinite"):
        hit_ratios(model, rows)


def test_an_item_may_be_put_last():
    scores = np.arange(30.0)[None]
    scores[0, 29] = -np.inf
    assert expected_hit_ratio(scores, np.array([[0]]), np.array([28])) == 1
    with pytest.raises(UserError, match=r"of shape \(1, 30\), not \(2, 30\)"):
        expected_hit_ratio(scores, np.array([[0], [1]]), np.array([28, 28]))
