"""Statistics of gates whose behaviour is known."""

import numpy as np
import pandas as pd
import pytest

from ilora.study.gate_statistics import gate_statistics, variance_between

pytestmark = pytest.mark.book


def test_a_constant_gate_is_flagged():
    users = np.arange(50)
    constant = np.tile([0.7, 0.1, 0.1, 0.1], (50, 1)) + 1e-4 * np.random.default_rng(0).normal(size=(50, 4))
    result = gate_statistics(constant, users)
    assert result["constant"] and result["personal"] < 1e-3
    assert result["leads"] == [1, 0, 0, 0]
    np.testing.assert_allclose(result["use"], [0.7, 0.1, 0.1, 0.1], atol=1e-3)
    same = np.full((50, 4), 0.25)
    assert gate_statistics(same, users)["entropy"]["value"] == pytest.approx(np.log(4))
    assert variance_between(same, users % 3) == {"value": None, "p": None, "n": 50}


def test_a_personal_gate_is_not():
    users = np.arange(48)
    result = gate_statistics(np.eye(4)[users % 4], users)
    assert not result["constant"] and result["personal"] == pytest.approx(0.75)
    assert result["entropy"]["value"] == pytest.approx(0, abs=1e-9)
    assert result["leads"] == result["use"] == [0.25] * 4
    assert result["largest_entropy"] == pytest.approx(np.log(4))


def test_gates_per_layer_are_averaged_over_layers_and_used_by_each():
    users = np.arange(48)
    personal, same = np.eye(4)[users % 4], np.full((48, 4), 0.25)
    result = gate_statistics(np.stack([personal, same]), users)
    alone = [gate_statistics(weights, users) for weights in (personal, same)]
    for name in ("personal", "largest_entropy"):
        assert result[name] == pytest.approx(np.mean([one[name] for one in alone]))
    assert result["entropy"]["value"] == pytest.approx(np.log(4) / 2) and result["entropy"]["n"] == 48
    for name in ("use", "leads"):
        assert result[name] == [one[name] for one in alone]


def test_the_test_detects_a_gate_that_follows_groups():
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    random = rng.dirichlet(np.ones(4), size=60)
    follows = 0.5 * random + 0.5 * np.eye(4)[labels]
    assert variance_between(follows, labels)["p"] < 0.01
    assert variance_between(np.eye(4)[labels], labels)["value"] == pytest.approx(1)
    independent = variance_between(random, labels)
    assert independent["p"] > 0.05 and independent["value"] < 0.2
    table = pd.DataFrame(follows).groupby(labels)
    between = (table.size() * ((table.mean() - follows.mean(0)) ** 2).sum(axis=1)).sum()
    expected = between / ((follows - follows.mean(0)) ** 2).sum()
    assert variance_between(follows, labels)["value"] == pytest.approx(expected)
