"""Guidance: the vector z that tells a gate about a row, Eq. 10's sequence representation or one of the paper's Fig. 5.

Each function returns z (batch, width) for a batch of `LanguageRecommender`; a row of z depends only on that row.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ilora.language.prompts import PROMPT
from ilora.recommenders.base import Recommender

Embed = Callable[[dict[str, Tensor]], Tensor]  # a batch -> (batch, tokens, hidden): its prompts' token embeddings


def sequence(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """The recommender's state after the history (Eq. 10), of the recommender's width."""
    return encoder.encode(batch["history"])


def random(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """Standard normal numbers, always the same for the same history: they distinguish rows but mean nothing."""
    rows = [np.random.default_rng([seed, *history]).standard_normal(width) for history in batch["history"].tolist()]
    return torch.tensor(np.array(rows), dtype=torch.float32, device=batch["history"].device)


def token(batch: dict[str, Tensor], encoder: Recommender, embed: Embed, width: int, seed: int) -> Tensor:
    """The mean of the prompt's token embeddings, projected at random to `width` (our choice) and normalised."""
    in_prompt = (batch["part"] == PROMPT)[..., None].float()  # (batch, tokens, 1)
    mean = (embed(batch).float() * in_prompt).sum(1) / in_prompt.sum(1)  # (batch, hidden)
    projection = torch.randn(mean.shape[1], width, generator=torch.Generator().manual_seed(seed))
    return functional.layer_norm(mean @ projection.to(mean.device), (width,), eps=1e-12)


GUIDANCE = {"sequence": sequence, "random": random, "token": token}
