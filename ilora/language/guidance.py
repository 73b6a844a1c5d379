"""Guidance: the vector z that a gate gets for a row, Eq. 10's sequence representation or one of the paper's Fig. 5."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ilora.language.prompts import PROMPT
from ilora.recommenders.base import Recommender

GUIDANCE = ("sequence", "random", "token")


def guide(kind: str, batch: dict[str, Tensor], encoder: Recommender, embed: Callable, width: int, seed: int) -> Tensor:
    """z (batch, width) for a batch of `LanguageRecommender`; a row of z depends only on that row.

    sequence: the recommender's state after the history (Eq. 10), of the recommender's width. random: standard normal
    numbers, the same for the same history. token: the mean of the prompt's token embeddings, `embed(batch)`, projected
    at random to `width` (our choice) and normalised.
    """
    history = batch["history"]
    if kind == "sequence":
        return encoder.encode(history)
    if kind == "random":
        rows = [np.random.default_rng([seed, *items]).standard_normal(width) for items in history.tolist()]
        return torch.tensor(np.array(rows), dtype=torch.float32, device=history.device)
    in_prompt = (batch["part"] == PROMPT)[..., None].float()  # (batch, tokens, 1)
    mean = (embed(batch).float() * in_prompt).sum(1) / in_prompt.sum(1)  # (batch, hidden)
    projection = torch.randn(mean.shape[1], width, generator=torch.Generator().manual_seed(seed))
    return functional.layer_norm(mean @ projection.to(mean.device), (width,), eps=1e-12)  # the scale of SASRec's states
