"""Guidance: what a gate is told about a row, Eq. 10's sequence representation or what the paper's Fig. 5 has for it.

A guidance gives z (batch, width) for the batch that LanguageRecommender makes; a row of z depends on that row
alone. A new one is a function here and its name in GUIDANCE.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ilora.recommenders.base import Recommender

Embed = Callable[[dict[str, Tensor]], Tensor]  # a batch -> (batch, tokens, hidden): its prompts' token embeddings


def sequence(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """The recommender's state after the history (Eq. 10); its own width."""
    return encoder.encode(batch["history"])


def random(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """Standard normal numbers, the same whenever the same history comes: they tell rows apart and mean nothing."""
    rows = [np.random.default_rng([seed, *history]).standard_normal(width) for history in batch["history"].tolist()]
    return torch.tensor(np.array(rows), dtype=torch.float32, device=batch["history"].device)


def token(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """The prompt's token embeddings collapsed to their mean, through a fixed random projection to `width`.

    The paper does not say how the mean gets the gate's width. It is brought to mean 0 and variance 1, the scale of a
    SASRec state.
    """
    inside = batch["prompt"][..., None].float()  # (batch, tokens, 1): neither padding nor answer
    mean = (embed(batch).float() * inside).sum(1) / inside.sum(1)  # (batch, hidden)
    projection = torch.randn(mean.shape[1], width, generator=torch.Generator().manual_seed(seed))
    return F.layer_norm(mean @ projection.to(mean.device), (width,), eps=1e-12)


GUIDANCE = {"sequence": sequence, "random": random, "token": token}
