"""Similarity of the gradients of groups of sequences: cosines, their noise, and tests against distance.

The paper's Figs. 1 and 3 compare clusters by the cosine of their gradients. What is here beyond it: a permutation
test of similarity against distance, and the similarity of two halves of one group, without which a low cosine may be
noise (the diagonal of Fig. 3 is 1 by definition).

    Letters: G groups, ... states of training.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ilora import runs
from ilora.model import Questions
from ilora.study.gradients import GATE

PERMUTATIONS = 9999


def joined(products: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inner products of whole groups from those of `halves`: (..., 2G, 2G) -> (..., G, G)."""
    found = {}
    for kind, part in products.items():
        groups = part.shape[-1] // 2
        found[kind] = part.reshape(*part.shape[:-2], groups, 2, groups, 2).sum((-3, -1))
    return found


def cosines(products: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cosine similarity of the groups' gradients, over "all" of A and B and for each kind: (..., G, G) each.

    "all" holds what the gate does to the gradients of A and B, but not the gate's own weights, as LoRA has none to
    compare; they are a kind. Raises UserError if a group's gradient is zero: it has no direction.
    """
    of_lora = [part for kind, part in products.items() if kind != GATE]
    return {kind: _cosine(part) for kind, part in {"all": sum(of_lora), **products}.items()}


def _cosine(products: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    if not (norm > 0).all():
        raise runs.UserError("a group's gradient is zero and has no direction: take a state from after the first step")
    return products / norm[..., :, None] / norm[..., None, :]


def repeatability(cosine: np.ndarray) -> np.ndarray:
    """Similarity of groups with other samples of themselves, as large, their mean: (..., 2G, 2G) of `halves` -> (...).

    It is what the diagonal would be if it were not 1 by definition, and what two groups that do not differ reach. From
    the mean c of the cosines of each group's two halves, which are half as large: 2c / (1 + |c|). For c above 0 that is
    Spearman and Brown's formula; below, where only noise leads, its mirror image, so that noise is 0 on average. The
    mean comes first because the formula is no straight line: of single noisy cosines it is too small.
    """
    first = np.arange(0, cosine.shape[-1], 2)
    between = cosine[..., first, first + 1].mean(-1)
    return 2 * between / (1 + np.abs(between))


def agreement(products: dict[str, np.ndarray]) -> dict[str, float]:
    """From inner products of `halves`, means over states: similarity with another sample of the `same`
    group (`repeatability`) and with `other` groups, and what other groups `lack` against the same."""
    same = float(repeatability(cosines(products)["all"]).mean())
    other = float(off_diagonal(cosines(joined(products))["all"]).mean())
    return {"same": same, "other": other, "lack": same - other}


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Each pair's entry of a symmetric (..., G, G), once: (..., G (G - 1) / 2), in the order of scipy's pdist."""
    return matrix[(..., *np.triu_indices(matrix.shape[-1], 1))]


def mantel(
    similarity: np.ndarray, distance: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, float]:
    """Spearman's rank correlation of two symmetric (G, G) over pairs, with a two-sided permutation test.

    Pairs share members and are not independent, so that the usual p value of a correlation does not hold. Here
    what is permuted are the G members (clusters, or sequences of different users): rows and columns of one
    matrix together (Mantel 1967). All G! orders where there are no more than `permutations`, else that many.
    """
    one, other = np.triu_indices(len(similarity), 1)
    ranks, against = (stats.zscore(stats.rankdata(matrix[one, other])) for matrix in (similarity, distance))
    square = np.zeros(distance.shape)
    square[one, other] = square[other, one] = against

    def correlation(order: np.ndarray) -> float:
        return ranks @ square[order[one], order[other]] / len(ranks)

    members, rng = np.arange(len(similarity)), np.random.default_rng(seed)
    test = stats.permutation_test(
        (members,), correlation, permutation_type="pairings", n_resamples=permutations, vectorized=False, rng=rng
    )
    return {"value": float(test.statistic), "p": float(test.pvalue), "pairs": len(ranks), "members": len(members)}


def ranked_pairs(similarity: np.ndarray) -> pd.DataFrame:
    """All pairs of a symmetric (n, n), most similar first: one, other (row numbers), similarity."""
    one, other = np.triu_indices(len(similarity), 1)
    table = pd.DataFrame({"one": one, "other": other, "similarity": similarity[one, other]})
    return table.sort_values("similarity", ascending=False, ignore_index=True)


def side_by_side(questions: Questions, pair: pd.Series, titles: Sequence[str]) -> pd.DataFrame:
    """The two sequences of a row of `ranked_pairs`, oldest title first, the next one last (Fig. 1, right)."""
    columns = {}
    for row in (int(pair["one"]), int(pair["other"])):
        history, _, target = questions[row]
        read = [titles[item] for item in history]
        window = questions.sequences.history.shape[1]
        columns[f"user {questions.sequences.user[row]}"] = [*[""] * (window - len(read)), *read, titles[target]]
    table = pd.DataFrame(columns)
    return table.set_axis([*range(1, len(table)), "next"])
