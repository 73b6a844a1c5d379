"""MoRec (Yuan et al. 2023): SASRec over item vectors that a pretrained text encoder writes from the titles."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from ilora import artifacts
from ilora.data.dataset import Dataset
from ilora.errors import UserError
from ilora.recommenders.popularity import Popularity
from ilora.recommenders.sasrec import SASRec

POOLINGS = ("mean", "cls")
NO_TOKEN = -1  # behind the end of a title that is shorter than the longest one
LEARNING_RATE = 0.05  # of the text encoder, as a share of that of the rest: it is pretrained
TITLES_AT_ONCE = 64


class MoRec(SASRec):
    """SASRec whose items are known by their titles alone; the text encoder is trained with it, end to end.

    Training encodes the items of a batch alone and takes them for the catalogue: softmax over m items in the batch,
    score minus log Q, where Q(i) = 1 - (1 - p(i))^n is how probably i is among the batch's n items if they are drawn by
    popularity p (the logQ correction of Yi et al. 2019, for distinct items). A batch that holds all items
    gives the full cross entropy of the other recommenders; that itself would encode every title in every step. Yuan et
    al. have binary cross entropy against one random item instead, whose title costs as much to encode as one that many
    states share here.
    """

    def __init__(
        self,
        n_items: int,
        text: dict,
        pooling: str,
        longest: int,
        dim: int = 64,
        window: int = 10,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(n_items, dim, window, layers, heads, dropout)
        self.config |= {"text": text, "pooling": pooling, "longest": longest}
        self.items = TitleVectors(n_items, text, pooling, longest, dim)
        self.register_buffer("popularity", torch.full((n_items,), 1 / n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset, text_encoder: str | Path, **config: int | float) -> "MoRec":
        """Untrained but for the text encoder, a sentence-transformers model: a folder or a name on the hub.

        Raises UserError for what cannot be loaded, has no safetensors weights, or pools otherwise than mean and cls.
        """
        encoder, tokens, pooling = _load(str(text_encoder), list(dataset.items["title"]))
        text = json.loads(encoder.config.to_json_string())
        model = cls(len(tokens), text, pooling, tokens.shape[1], **config)
        model.items.text.load_state_dict(encoder.state_dict())
        model.items.tokens.copy_(tokens)
        counts = Popularity.from_dataset(dataset).counts
        model.popularity.copy_(counts / counts.sum())
        return model

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """The text encoder learns more slowly, and no L2 draws it away from what it knows."""
        (group,) = super().parameter_groups(weight_decay)
        text = list(self.items.text.parameters())
        inside = {id(parameter) for parameter in text}
        rest = [parameter for parameter in group["params"] if id(parameter) not in inside]
        return [group | {"params": rest}, {"params": text, "weight_decay": 0.0, "lr_scale": LEARNING_RATE}]

    def forward(self, batch: Tensor, progress: float = 0.0, step_seed: int = 0) -> Tensor:
        """Cross entropy of the item after each state among the batch's items, see the class."""
        distinct, place = batch.unique(return_inverse=True)  # (m,), (batch, window + 1); padding is the largest id
        vectors = self.items(distinct)  # (m, dim)
        history, real = place[:, :-1], batch[:, :-1] != self.n_items
        states = self.states(vectors[history], real, n=history.shape[1])
        drawn = (batch != self.n_items).sum()
        p = self.popularity[distinct.clamp(max=self.n_items - 1)]
        log_q = (-torch.expm1(drawn * torch.log1p(-p))).clamp(min=1e-12).log()
        logits = states[real] @ vectors.T - log_q.masked_fill(distinct == self.n_items, torch.inf)
        return functional.cross_entropy(logits, place[:, 1:][real], reduction="sum") / real.numel()


class TitleVectors(nn.Module):
    """Item ids -> vectors (..., dim): text encoder, pooled tokens, norm and linear map; zeros for padding.

    The norm stands in the place of the layer by which some sentence-transformers models end. In eval mode the
    vectors of all items are made once and kept in a buffer, until training changes what they are made from: NaN
    says that they are to be made.
    """

    def __init__(self, n_items: int, text: dict, pooling: str, longest: int, dim: int) -> None:
        super().__init__()
        self.n_items, self.pooling = n_items, pooling
        self.text = AutoModel.from_config(AutoConfig.for_model(**text), dtype=torch.float32)
        self.norm = nn.LayerNorm(width := self.text.config.hidden_size)
        self.projection = nn.Linear(width, dim)
        nn.init.normal_(self.projection.weight, std=0.02 / width**0.5)  # vectors as small as embeddings at the start
        nn.init.zeros_(self.projection.bias)
        self.register_buffer("tokens", torch.zeros(n_items, longest, dtype=torch.long))  # of the titles
        self.register_buffer("vectors", torch.full((n_items + 1, dim), torch.nan))

    def train(self, mode: bool = True) -> "TitleVectors":
        if mode and any(parameter.requires_grad for parameter in self.parameters()):
            self.vectors.fill_(torch.nan)
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        """(n_items + 1, dim) vectors of all items and of padding, as an embedding table has them."""
        every = torch.arange(self.n_items + 1, device=self.vectors.device)
        if self.training:
            return self._encode(every)
        if self.vectors.isnan().any():
            with torch.no_grad():
                self.vectors.copy_(self._encode(every))
        return self.vectors

    def forward(self, items: Tensor) -> Tensor:
        if not self.training:
            return self.weight[items]
        distinct, place = items.unique(return_inverse=True)
        return self._encode(distinct)[place]

    def _encode(self, items: Tensor) -> Tensor:
        """(m,) -> (m, dim)"""
        tokens = self.tokens[items.clamp(max=self.n_items - 1)]  # any title in the place of padding
        order = (tokens != NO_TOKEN).sum(1).argsort()  # titles of like length together
        parts = tqdm(tokens[order].split(TITLES_AT_ONCE), "encoding titles", delay=2, disable=self.training)
        pooled = torch.cat([self._pool(part) for part in parts])[order.argsort()]
        return self.projection(self.norm(pooled)) * (items < self.n_items)[:, None]

    def _pool(self, tokens: Tensor) -> Tensor:
        """(m, tokens) -> (m, hidden)"""
        inside = tokens != NO_TOKEN
        tokens, inside = (part[:, : inside.sum(1).max()] for part in (tokens, inside))
        states = self.text(input_ids=tokens.clamp(min=0), attention_mask=inside.long()).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        inside = inside[..., None].to(states.dtype)
        return (states * inside).sum(1) / inside.sum(1)


def _load(text_encoder: str, titles: Sequence[str]) -> tuple[nn.Module, Tensor, str]:
    """A pretrained text encoder, its tokens of the titles (titles, longest), how it pools."""
    name, revision = f"text_encoder {text_encoder!r}", artifacts.revision(text_encoder)
    pinned = {"trust_remote_code": False} | revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_encoder, **pinned)
        encoder = AutoModel.from_pretrained(text_encoder, use_safetensors=True, dtype=torch.float32, **pinned)
        pooling_file = "1_Pooling/config.json"
        found = cached_file(text_encoder, pooling_file, _raise_exceptions_for_missing_entries=False, **revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be loaded ({str(error).splitlines()[0]}): name a folder or a model of the Hugging Face "
            "hub with safetensors weights"
        ) from error
    if encoder.config.is_encoder_decoder:
        raise UserError(f"{name} has a decoder: choose one that only encodes, such as a BERT")
    pooling = _pooling(json.loads(Path(found).read_text("utf-8"))) if found else "mean"
    if pooling not in POOLINGS:
        raise UserError(f"{name} pools its tokens by {pooling!r}: choose one that pools by mean or cls")
    ids = tokenizer(list(titles), truncation=True).input_ids
    tokens = np.full((len(ids), max(map(len, ids))), NO_TOKEN)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = own
    return encoder, torch.from_numpy(tokens), pooling


def _pooling(config: dict) -> str:
    """The pooling that sentence-transformers' 1_Pooling/config.json names; until its version 6 by a flag for each."""
    flags = [name for name, chosen in config.items() if name.startswith("pooling_mode_") and chosen]
    modes = config.get("pooling_mode", flags)
    names = [modes] if isinstance(modes, str) else modes
    return " and ".join(re.sub("^pooling_mode_|_tokens?$", "", name) for name in names)
