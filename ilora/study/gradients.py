"""Clusters of n sequences, and gradients of the training loss summed over each (the paper's Figs. 1 and 3)."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor, nn
from tqdm import tqdm

from ilora.data.windows import Questions
from ilora.errors import UserError
from ilora.language.recommender import LanguageRecommender
from ilora.recommenders.base import SequenceModel, k_means
from ilora.training.checkpoints import load_snapshot

GATE = "gate"  # the gate's own weights, next to q_proj, ..., down_proj


@torch.no_grad()
def representations(encoder: SequenceModel, history: np.ndarray, batch_size: int = 4096) -> np.ndarray:
    """z of padded histories (n, window) -> (n, dim), the gate's input (Eq. 10)."""
    encoder.eval()
    device, batches = encoder.item_embeddings.device, torch.from_numpy(history).split(batch_size)
    return torch.cat([encoder.encode(batch.to(device)).cpu() for batch in batches]).numpy()


def clusters(z: np.ndarray, count: int = 8, seed: int = 0, users: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """k-means of z (n, dim): the cluster of each sequence (n,) and the centres (count, dim), in hierarchical order.

    Raises UserError unless every cluster has two or more users (n,), as `halves` needs; default: one per sequence.
    """
    labels, centres = k_means(z, count, seed, np.arange(len(z)) if users is None else users)
    order = leaves_list(linkage(centres, "average", optimal_ordering=True))
    return order.argsort()[labels], centres[order]


def halves(labels: np.ndarray, users: np.ndarray, seed: int = 0) -> np.ndarray:
    """Split each group in two by users, with similar numbers of sequences: label g becomes 2g or 2g + 1, (n,) each."""
    rng, split = np.random.default_rng(seed), np.empty_like(labels)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        _, user, count = np.unique(users[members], return_inverse=True, return_counts=True)
        half, size = np.zeros(len(count), int), [0, 0]
        for number in rng.permutation(len(count)):  # each user goes to the half with fewer sequences so far
            half[number] = size[1] < size[0]
            size[half[number]] += count[number]
        split[members] = 2 * label + half[user]
    return split


def group_gradients(model: LanguageRecommender, questions: Questions, labels: np.ndarray, batch_size: int = 32) -> dict:
    """Gradient of the loss summed over each group's sequences: kind (see `adapter_parameters`) -> (G, its parameters).

    labels: (n,) from 0 to G - 1, no group empty. The loss is that of hybrid prompts, without dropout.
    """
    groups = int(labels.max()) + 1
    if labels.shape != (len(questions),) or len(np.unique(labels)) != groups or labels.min() < 0:
        raise ValueError(f"labels must give each of {len(questions)} questions one of the groups 0 to G - 1")
    kinds = adapter_parameters(model)
    parameters = [parameter for kind in kinds.values() for parameter in kind]
    sizes = [sum(parameter.numel() for parameter in kind) for kind in kinds.values()]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    sums = torch.zeros(groups, sum(sizes), dtype=dtype)
    model.eval()
    length = np.array([model.length(questions[row]) for row in range(len(questions))])
    members_of_groups = np.split(np.lexsort((length, labels)), np.cumsum(np.bincount(labels))[:-1])
    with tqdm(total=len(labels), unit="sequence", desc="gradients", mininterval=1) as bar:
        for group, members in enumerate(members_of_groups):
            total = [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters]
            for start in range(0, len(members), batch_size):
                rows = [questions[row] for row in members[start : start + batch_size]]
                gradients = torch.autograd.grad(summed_loss(model, rows), parameters)
                for part, gradient in zip(total, gradients, strict=True):
                    part += gradient
                bar.update(len(rows))
            sums[group] = torch.cat([part.flatten() for part in total]).cpu()
    return dict(zip(kinds, sums.split(sizes, dim=1), strict=True))


def summed_loss(model: LanguageRecommender, rows: list) -> Tensor:
    """The training loss summed over the rows; the model's is their mean."""
    batch = {name: value.to(model.device) for name, value in model.collate(rows).items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):  # as in training
        return model(batch, progress=1.0) * len(rows)


def adapter_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """A and B of all layers for each kind of module, such as q_proj; the gate last. Raises UserError without any."""
    kinds, gate = {}, []
    for name, parameter in model.named_parameters():
        if ".lora_gate." in name:
            gate.append(parameter)
        elif part := re.search(r"(\w+)\.lora_[AB]\.", name):
            kinds.setdefault(part[1], []).append(parameter)
    if not kinds:
        raise UserError("the model has no adapter and hence no LoRA gradients: use one tuned with LoRA or iLoRA")
    return kinds | ({GATE: gate} if gate else {})


def inner_products(gradients: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Inner products of the groups' gradients: kind -> (G, G)."""
    return {kind: (part @ part.T).double().numpy() for kind, part in gradients.items()}


def products_over_training(
    model: LanguageRecommender, snapshots: Sequence[Path], questions: Questions, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """`inner_products` at S saved states of training: kind -> (S, G, G). The model is left unchanged."""
    before = {name: value.detach().clone() for name, value in model.trainable_state().items()}
    products = []
    try:
        for path in snapshots:
            load_snapshot(model, path)
            products.append(inner_products(group_gradients(model, questions, labels)))
    finally:
        model.load_state_dict(before, strict=False)
    return {kind: np.stack([state[kind] for state in products]) for kind in products[0]}
