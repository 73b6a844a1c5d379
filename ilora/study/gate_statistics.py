"""Statistics of gates of K experts: how sharp, balanced and personal they are, and whether they follow groups."""

import numpy as np
from scipy import stats

from ilora.evaluation import interval

LEAST_PERSONAL = 0.01  # a gate with a smaller personal share is called constant


def gate_statistics(weights: np.ndarray, users: np.ndarray) -> dict:
    """Statistics of gate weights (n, K), or (layers, n, K) of a gate per layer; users: (n,).

    entropy: mean in nats; use: each expert's mean weight; leads: the share of sequences in which it is largest;
    personal: the mean total variation distance from the mean gate; constant: so small that iLoRA equals LoRA.
    """
    experts = weights.shape[-1]
    entropy = stats.entropy(weights, axis=-1).reshape(-1, len(users)).mean(0)
    personal = float(np.abs(weights - weights.mean(-2, keepdims=True)).sum(-1).mean() / 2)
    return {
        "entropy": interval(entropy, users),
        "largest_entropy": float(np.log(experts)),
        "use": weights.mean(-2).astype(float).tolist(),
        "leads": (weights.argmax(-1)[..., None] == np.arange(experts)).mean(-2).tolist(),
        "personal": personal,
        "constant": personal < LEAST_PERSONAL,
    }


def variance_between(weights: np.ndarray, labels: np.ndarray, permutations: int = 999, seed: int = 0) -> dict:
    """The share of the variance of gate weights (n, K) that is between groups (n,), one sequence per user, and its p.

    The test permutes sequences. For a constant gate value and p are None.
    """
    centred = weights - weights.mean(0)
    total = (centred**2).sum()
    if np.allclose(centred, 0, atol=1e-6):
        return {"value": None, "p": None, "n": len(labels)}

    def share(labels: np.ndarray) -> float:
        sums = np.stack([np.bincount(labels, column) for column in centred.T])
        return (sums**2 / np.maximum(np.bincount(labels), 1)).sum() / total

    test = stats.permutation_test(
        (labels,), share, permutation_type="pairings", n_resamples=permutations, batch=100, vectorized=False,
        alternative="greater", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"value": float(test.statistic), "p": float(test.pvalue), "n": len(labels)}
