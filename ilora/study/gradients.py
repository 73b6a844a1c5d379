"""Why an adapter for each history may help: gradients of groups of sequences, and what a gate does.

The paper's Figs. 1 and 3: sequences are clustered on SASRec's representations, and the gradient of the training
loss is summed over each cluster. similarity.py compares the sums.

    Letters: n sequences, G groups, S snapshots of training, K experts, dim the width of a representation.
"""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor, nn
from tqdm import tqdm

from ilora import runs
from ilora.evaluation import interval
from ilora.model import LanguageRecommender, Questions
from ilora.recommenders import SequenceModel
from ilora.training import load_snapshot

RESTARTS = 10
GATE = "gate"  # the kind of the gate's own weights, beside q_proj, ..., down_proj
LEAST_PERSONAL = 0.01  # a gate that moves less of its weight than this is called constant


# ---------------------------------------------------------------- clusters


@torch.no_grad()
def representations(encoder: SequenceModel, history: np.ndarray, batch_size: int = 4096) -> np.ndarray:
    """z of padded histories (n, window) -> (n, dim), the gate's input (Eq. 10)."""
    encoder.eval()
    device = encoder.item_embeddings.device
    parts = torch.from_numpy(history).split(batch_size)
    return torch.cat([encoder.encode(part.to(device)).cpu() for part in parts]).numpy()


def clusters(
    z: np.ndarray, count: int = 8, seed: int = 0, users: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """k-means of z (n, dim): each one's cluster (n,) and the clusters' centres (count, dim).

    Clusters are numbered in the leaf order of a hierarchical clustering of their centres (average linkage,
    Euclidean), so that near ones have near numbers. The hierarchy is over the centres alone: over 40,000
    sequences it would need their 800 million distances. Each cluster has sequences of two
    users (n,) or more, to be cut into halves (None: each sequence is another user's); raises UserError when that
    cannot be, as with too few distinct rows.
    """
    rng, best = np.random.default_rng(seed), (np.inf, np.empty(0))
    z, users = np.asarray(z, float), np.arange(len(z)) if users is None else users
    for _ in range(RESTARTS if len(np.unique(z, axis=0)) >= count else 0):
        with contextlib.suppress(ClusterError):  # a cluster lost its last sequence: this start does not count
            centres, labels = kmeans2(z, count, iter=25, minit="++", missing="raise", rng=rng)
            if min(len(np.unique(users[labels == label])) for label in range(count)) > 1:
                best = min(best, (((z - centres[labels]) ** 2).sum(), labels), key=lambda found: found[0])
    labels = best[1]
    if len(np.unique(labels)) < count:
        raise runs.UserError(f"{len(z)} sequences do not fall into {count} clusters: take more of them")
    centres = np.stack([z[labels == label].mean(0) for label in range(count)])
    order = leaves_list(linkage(centres, "average", optimal_ordering=True))
    return order.argsort()[labels], centres[order]


def halves(labels: np.ndarray, users: np.ndarray, seed: int = 0) -> np.ndarray:
    """Each group cut into two: label g becomes 2g or 2g + 1; labels, users (n,) of each sequence.

    A user's sequences are alike, so all of them fall into one half, or the halves would not be samples of their own.
    Users come in random order, each to the half that has fewer sequences by then.
    """
    rng, cut = np.random.default_rng(seed), np.empty_like(labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        own, count = np.unique(users[members], return_inverse=True, return_counts=True)[1:]
        half, filled = np.zeros(len(count), int), [0, 0]
        for user in rng.permutation(len(count)):
            half[user] = filled[1] < filled[0]
            filled[half[user]] += count[user]
        cut[members] = 2 * label + half[own]
    return cut


# ---------------------------------------------------------------- gradients


def gradients(
    model: LanguageRecommender, questions: Questions, labels: np.ndarray, batch_size: int = 32
) -> dict[str, Tensor]:
    """Gradient of the training loss summed over each group's sequences: kind of module -> (G, its parameters).

    labels: (n,) group of each question, 0 to G - 1, none empty; np.arange(n) gives every sequence's own gradient.

    The loss of a sequence is that of training on hybrid prompts, without dropout. A kind (`q_proj`, ...,
    `down_proj`) holds LoRA's A and B of all layers; iLoRA's carry the factor w_k of the sequence, so that
    sequences with other experts have gradients in other places. The gate's own weights are a kind, `gate`.
    While B is zero, as at the first step, A has no gradient and similarity is that of B's gradients alone.

    Sequences are sorted by group, and by length within it, and go backward in batches that hold one group: the
    cost is that of training on them once, the memory one float32 vector a group here, two on the model's device.
    Raises UserError if the model has no adapter, ValueError if labels do not fit the questions.
    """
    groups = int(labels.max()) + 1
    if labels.shape != (len(questions),) or len(np.unique(labels)) != groups or labels.min() < 0:
        raise ValueError(f"labels must give each of {len(questions)} questions one of the groups 0 to G - 1")
    kinds = _adapter_parameters(model)
    parameters = [parameter for kind in kinds.values() for parameter in kind]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    found = {kind: torch.zeros(groups, sum(p.numel() for p in own), dtype=dtype) for kind, own in kinds.items()}
    model.eval()
    length = np.array([model.length(questions[row]) for row in range(len(questions))])
    order = np.lexsort((length, labels))
    with tqdm(total=len(order), unit="sequence", desc="gradients", mininterval=1) as bar:
        for group, members in enumerate(np.split(order, np.cumsum(np.bincount(labels))[:-1])):
            total = [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters]
            for start in range(0, len(members), batch_size):
                rows = [questions[row] for row in members[start : start + batch_size]]
                for sum_, part in zip(total, torch.autograd.grad(_loss(model, rows), parameters), strict=True):
                    sum_ += part
                bar.update(len(rows))
            flat, sizes = torch.cat([part.flatten() for part in total]), [part.shape[1] for part in found.values()]
            for kind, part in zip(found, flat.split(sizes), strict=True):
                found[kind][group] = part.cpu()
    return found


def _loss(model: LanguageRecommender, rows: list) -> Tensor:
    """The training loss summed over the rows; `forward` gives their mean, whatever their number."""
    batch = {name: value.to(model.device) for name, value in model.collate(rows).items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):  # as in training
        return model(batch, progress=1.0) * len(rows)


def _adapter_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The adapter's parameters by kind, in the model's order, the gate last."""
    kinds, gate = {}, []
    for name, parameter in model.named_parameters():
        if ".lora_gate." in name:
            gate.append(parameter)
        elif part := re.search(r"(\w+)\.lora_[AB]\.", name):
            kinds.setdefault(part[1], []).append(parameter)
    if not kinds:
        raise runs.UserError("the model has no adapter, hence no LoRA gradients: give one tuned with LoRA or iLoRA")
    return kinds | ({GATE: gate} if gate else {})


def products(gradients: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Inner products of the groups' gradients: kind -> (G, G)."""
    return {kind: (part @ part.T).double().numpy() for kind, part in gradients.items()}


def products_along(
    model: LanguageRecommender,
    snapshots: Sequence[Path],
    questions: Questions,
    labels: np.ndarray,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """`products` of the groups' gradients in each state that training kept: kind -> (S, G, G).

    The model ends as it came. Cosines are to be taken of each state, then averaged: the size of gradients
    falls while a model learns, and the first states would outvote the others.
    """
    before = {name: value.detach().clone() for name, value in model.trainable_state().items()}
    found = []
    try:
        for path in snapshots:
            load_snapshot(model, path)
            found.append(products(gradients(model, questions, labels, batch_size)))
    finally:
        model.load_state_dict(before, strict=False)
    return {kind: np.stack([one[kind] for one in found]) for kind in found[0]}


# ---------------------------------------------------------------- gates


def gate_statistics(weights: np.ndarray, users: np.ndarray) -> dict:
    """How sharp, how balanced and how personal a gate is; weights (n, K), or (layers, n, K) of a gate per layer.

    entropy: mean over sequences and layers, nats, with its interval by users (n,); `largest_entropy` is ln K, that
        of a uniform gate. use: each expert's mean weight, (K,) or (layers, K). leads: the share of sequences in
        which it has the largest weight.
    personal: the share of a gate's weight that differs from the mean gate, averaged over sequences and layers (total
        variation). constant: whether that is below LEAST_PERSONAL, and iLoRA LoRA under another name.
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


def gate_against(weights: np.ndarray, labels: np.ndarray, permutations: int = 999, seed: int = 0) -> dict[str, float]:
    """The share of the variance of gate weights (n, K) that is between groups (n,), with a permutation test.

    What is permuted are the sequences' labels, so give one sequence a user: those of one user are alike.
    A constant gate has no variance to share: value and p are None.
    """
    centred = weights - weights.mean(0)
    whole = (centred**2).sum()
    if np.allclose(centred, 0, atol=1e-6):
        return {"value": None, "p": None, "n": len(labels)}

    def share(labels: np.ndarray) -> float:
        sums = np.stack([np.bincount(labels, column) for column in centred.T])
        return (sums**2 / np.maximum(np.bincount(labels), 1)).sum() / whole

    rng = np.random.default_rng(seed)
    test = stats.permutation_test(
        (labels,), share, permutation_type="pairings", n_resamples=permutations, batch=100,
        vectorized=False, alternative="greater", rng=rng,
    )  # fmt: skip
    return {"value": float(test.statistic), "p": float(test.pvalue), "n": len(labels)}
