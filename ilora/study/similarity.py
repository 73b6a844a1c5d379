"""Similarity of groups' gradients: cosines (Figs. 1 and 3), their value without noise, and a test against distance."""

import numpy as np
from scipy import stats
from scipy.spatial.distance import squareform

from ilora.errors import UserError
from ilora.study.gradients import GATE


def join(products: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
    """Inner products of sums of gradients: (..., n, n) -> (..., G, G), where gradient i is a part of sum groups[i]."""
    part_of = np.eye(max(groups) + 1)[groups]  # (n, G)
    return {kind: part_of.T @ matrix @ part_of for kind, matrix in products.items()}


def join_halves(products: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inner products of whole groups from those of `gradients.halves`: (..., 2G, 2G) -> (..., G, G)."""
    return join(products, np.arange(next(iter(products.values())).shape[-1]) // 2)


def cosines(products: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cosines of G groups' gradients, (..., G, G) for each kind and "all" but the gate. Raises UserError for zeros."""
    lora = sum(part for kind, part in products.items() if kind != GATE)
    products = {"all": lora, **products}
    norms = {kind: np.sqrt(np.diagonal(part, axis1=-2, axis2=-1)) for kind, part in products.items()}
    if not all((norm > 0).all() for norm in norms.values()):
        raise UserError("a group's gradient is zero and has no direction: use a state after the first step")
    return {kind: part / norms[kind][..., :, None] / norms[kind][..., None, :] for kind, part in products.items()}


def repeatability(half_cosines: np.ndarray) -> np.ndarray:
    """Mean similarity of a group with another sample of itself, from cosines of `halves`: (..., 2G, 2G) -> (...).

    For the mean c over groups, the Spearman-Brown formula 2c / (1 + |c|), mirrored for c < 0 (noise). The mean comes
    first: the formula is concave, so noise in single cosines is a bias.
    """
    first = np.arange(0, half_cosines.shape[-1], 2)
    mean = half_cosines[..., first, first + 1].mean(-1)
    return 2 * mean / (1 + np.abs(mean))


def same_and_other_groups(products: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean similarity to the `same` group (`repeatability`) and to `other` groups, and what the others `lack`."""
    same = float(repeatability(cosines(products)["all"]).mean())
    other = float(off_diagonal(cosines(join_halves(products))["all"]).mean())
    return {"same": same, "other": other, "lack": same - other}


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The entries above the diagonal of symmetric (..., G, G): (..., G (G - 1) / 2), in the order of scipy's pdist."""
    return matrix[(..., *np.triu_indices(matrix.shape[-1], 1))]


def mantel(similarity: np.ndarray, distance: np.ndarray, permutations: int = 9999, seed: int = 0) -> dict[str, float]:
    """Spearman's rank correlation of two symmetric (G, G) over pairs, and p of Mantel's test: it permutes members."""
    ranks, distance_ranks = (stats.zscore(stats.rankdata(off_diagonal(each))) for each in (similarity, distance))
    square = squareform(distance_ranks)
    test = stats.permutation_test(
        (np.arange(len(similarity)),), lambda order: ranks @ off_diagonal(square[np.ix_(order, order)]) / len(ranks),
        permutation_type="pairings", n_resamples=permutations, vectorized=False, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"value": float(test.statistic), "p": float(test.pvalue), "pairs": len(ranks), "members": len(similarity)}
