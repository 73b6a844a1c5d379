"""Similarity of known gradients, and tests against distance under independence and under a known relation."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from ilora.errors import UserError
from ilora.study import gradients, similarity

pytestmark = pytest.mark.book

LABELS = np.array([2, 0, 2, 1, 2, 0, 2, 2, 1, 2, 2])  # groups of 2, 2 and 7
VECTORS = {
    "one": torch.tensor([[2.0, 0], [0, 3], [-1, 0]]),
    "two": torch.tensor([[1.0], [4], [1]]),
    "gate": torch.tensor([[1.0], [1], [-2]]),
}


def test_cosines_of_known_vectors():
    result = similarity.cosines(gradients.inner_products(VECTORS))
    assert list(result) == ["all", "one", "two", "gate"]
    np.testing.assert_allclose(result["one"], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(result["two"], np.ones((3, 3)), atol=1e-7)
    a, b, c = 4 / 5**0.5 / 5, -1 / 10**0.5, 4 / 5 / 2**0.5
    np.testing.assert_allclose(result["all"], [[1, a, b], [a, 1, c], [b, c, 1]], atol=1e-7)
    np.testing.assert_allclose(result["gate"], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-7)  # and not in "all"


def test_a_zero_gradient_has_no_direction():
    with pytest.raises(UserError, match="zero"):
        similarity.cosines(gradients.inner_products({"one": torch.tensor([[1.0, 0], [0, 0]])}))


def test_halves_join_to_the_whole():
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(len(LABELS), 5)))
    cut = gradients.halves(LABELS, np.arange(len(LABELS)))
    np.testing.assert_array_equal(cut // 2, LABELS)
    assert np.bincount(cut).tolist() == [1, 1, 1, 1, 4, 3]

    def sums(labels):
        return torch.stack([vectors[labels == label].sum(0) for label in np.unique(labels)])

    whole, parts = (gradients.inner_products({"one": sums(labels)}) for labels in (LABELS, cut))
    np.testing.assert_allclose(similarity.join_halves(parts)["one"], whole["one"])
    stacked = {"one": np.stack([parts["one"], 2 * parts["one"]])}
    np.testing.assert_allclose(similarity.join_halves(stacked)["one"], [whole["one"], 2 * whole["one"]])
    overlaps, overlap = np.unique([cut, np.arange(len(LABELS)) % 2], axis=1, return_inverse=True)  # one pass for both
    parts = gradients.inner_products({"one": sums(overlap)})
    for groups, labels in zip(overlaps, (cut, np.arange(len(LABELS)) % 2), strict=True):
        expected = gradients.inner_products({"one": sums(labels)})["one"]
        np.testing.assert_allclose(similarity.join(parts, groups)["one"], expected)


def test_repeatability_is_the_similarity_of_another_sample():
    rng, size = np.random.default_rng(0), 200_000
    signal = rng.normal(size=(3, size)) * np.array([[0.0], [0.5], [2.0]])
    half = np.repeat(signal, 2, axis=0) / 2 + rng.normal(size=(6, size)) * np.sqrt(0.5)
    other = signal + rng.normal(size=(3, size))
    drawn = np.vstack([half[::2] + half[1::2], other])
    expected = np.diag(similarity.cosines({"q_proj": drawn @ drawn.T})["all"][:3, 3:])
    halves = similarity.cosines({"q_proj": half @ half.T})["all"]
    each = [similarity.repeatability(halves[2 * g : 2 * g + 2, 2 * g : 2 * g + 2]) for g in range(3)]
    np.testing.assert_allclose(each, expected, atol=0.01)
    assert np.ptp(expected) > 0.5


def test_pairs_are_in_the_order_of_pdist():
    points = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_array_equal(similarity.off_diagonal(squareform(pdist(points))), pdist(points))


def symmetric(rng, n):
    return squareform(rng.normal(size=n * (n - 1) // 2))


def test_the_permutation_test_is_level_under_independence():
    """Distances of points share members, so that a test of pairs as if independent would reject too often."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(200):
        one, other = (squareform(pdist(rng.normal(size=(8, 1)))) for _ in range(2))
        p.append(similarity.mantel(one, other, permutations=99)["p"])
    for level in (0.1, 0.3, 0.5, 0.8):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / 200)


def test_a_known_relation_is_detected_with_its_sign():
    rng = np.random.default_rng(0)
    distance = squareform(pdist(rng.normal(size=(8, 3))))
    result = similarity.mantel(-distance + 0.2 * symmetric(rng, 8), distance, permutations=999)
    assert result["value"] < -0.8 and result["p"] < 0.01
    assert (result["pairs"], result["members"]) == (28, 8)
    assert similarity.mantel(-(distance**3), distance, permutations=9)["value"] == pytest.approx(-1)  # ranks
    assert similarity.mantel(symmetric(rng, 8), distance, permutations=99)["p"] > 0.05


def test_what_other_groups_lack_excludes_noise():
    """Two groups with one direction and noise agree as a group does with itself; opposite ones lack twice as much."""
    rng, size = np.random.default_rng(0), 200_000
    noise, signal = rng.normal(size=(4, size)), rng.normal(size=size)
    for signs, lack in (([1, 1, 1, 1], 0), ([1, 1, -1, -1], 1)):
        half = torch.from_numpy(np.outer(signs, signal) + noise)
        result = similarity.same_and_other_groups({"one": gradients.inner_products({"one": half})["one"][None]})
        assert result["same"] == pytest.approx(2 / 3, abs=0.01)  # halves have cosine 1/2
        assert result["other"] == pytest.approx(2 / 3 * (1 - 2 * lack), abs=0.01)
        assert result["lack"] == pytest.approx(result["same"] - result["other"])


def test_halves_that_point_apart_are_not_made_to_point_beyond():
    cosine = np.array([[1.0, -0.9], [-0.9, 1.0]])  # Spearman and Brown's formula would give -18
    assert similarity.repeatability(cosine) == pytest.approx(-1.8 / 1.9)


def test_noise_in_few_dimensions_lacks_nothing_on_average():
    rng = np.random.default_rng(0)
    half = torch.from_numpy(rng.normal(size=(2000, 16, 100)))
    lack = [similarity.same_and_other_groups(gradients.inner_products({"one": one}))["lack"] for one in half]
    assert abs(np.mean(lack)) < 3 * np.std(lack) / np.sqrt(len(lack))
