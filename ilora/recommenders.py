"""Recommenders behind one contract: popularity, and sequence models over item ids (SASRec, GRU4Rec, Caser).

A history is a row of item ids, oldest first, filled up on the left with the padding id `n_items`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ilora import runs
from ilora.data import Dataset


class Recommender(nn.Module):
    """What every recommender can do; a subclass gives `score_all`, and `encode` where it has states."""

    window = 1  # items of a history that it reads, the last ones

    def __init__(self, **config: int | float | str | dict) -> None:
        super().__init__()
        self.config = config  # the arguments that make it anew
        self.n_items = config["n_items"]

    @property
    def device(self) -> torch.device:
        """Where its weights, or its counts, are."""
        return next(iter(self.state_dict().values())).device

    def score_all(self, history: Tensor) -> Tensor:
        """Scores of all items as the next one: (batch, window) item ids -> (batch, n_items)."""
        raise NotImplementedError

    def score(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Scores of candidates as the next item: (batch, window), (batch, C) item ids -> (batch, C)."""
        return self.score_all(history).gather(1, candidates)

    def encode(self, history: Tensor) -> Tensor:
        """The representation z of each history: (batch, window) item ids -> (batch, dim)."""
        raise NotImplementedError(f"{type(self).__name__} has no sequence representation")

    def pad(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Histories without padding -> (batch, window) item ids, the last ones of each."""
        padded = np.full((len(histories), self.window), self.n_items)
        for row, history in zip(padded, histories, strict=True):
            recent = history[-self.window :]
            row[self.window - len(recent) :] = recent
        return torch.from_numpy(padded)

    @torch.no_grad()
    def rank(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """Scores of each row's candidates, (rows, candidates); a row is one of `model.Questions`."""
        histories, candidates, _ = zip(*rows, strict=True)
        history, offered = self.pad(histories), torch.from_numpy(np.stack(candidates))
        return self.score(history.to(self.device), offered.to(self.device))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """All parameters, with L2 regularisation: `weight_decay` times the weights is added to the gradient.

        That is Adam's coupled weight decay, the gradient of weight_decay / 2 * |weights|^2, not AdamW's.
        """
        return [{"params": list(self.parameters()), "weight_decay": weight_decay, "decoupled_weight_decay": False}]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`."""
        runs.write_json(Path(folder, "config.json"), {"class": type(self).__name__, **self.config})
        runs.write_atomic(Path(folder, "model.safetensors"), safetensors.torch.save(self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Recommender":
        """Read what `save_pretrained` wrote, in eval mode: a `cls` or one of its subclasses, as config.json says.

        Raises UserError for anything else.
        """
        try:
            config = json.loads(Path(folder, "config.json").read_text("utf-8"))
            kinds = {kind.__name__: kind for kind in _family(cls)}
            if (name := config.pop("class")) not in kinds:
                raise KeyError(f"config.json names {name}, no {cls.__name__}")
            model = kinds[name](**config)
            model.load_state_dict(safetensors.torch.load_file(Path(folder, "model.safetensors")))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise runs.UserError(f"cannot read a {cls.__name__} from {folder} ({why}): train it again") from error
        return model.eval()


def _family(cls: type[Recommender]) -> Iterator[type[Recommender]]:
    yield cls
    for kind in cls.__subclasses__():
        yield from _family(kind)


class Popularity(Recommender):
    """An item's score is how often the training users chose it; the history does not matter."""

    def __init__(self, n_items: int) -> None:
        super().__init__(n_items=n_items)
        self.register_buffer("counts", torch.zeros(n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Popularity":
        """Count the events of the users in the train split."""
        train = (dataset.users["split"] == "train").to_numpy()[dataset.events["user"]]
        model = cls(len(dataset.items))
        counts = np.bincount(dataset.events["item"][train], minlength=model.n_items)
        model.counts += torch.from_numpy(counts)
        return model.eval()

    def score_all(self, history: Tensor) -> Tensor:
        return self.counts.expand(len(history), -1)


class SequenceModel(Recommender):
    """A recommender with a state z for each history, trained with cross entropy; a subclass implements `read`.

    `encode` gives z of iLoRA's Eq. 11. Item embeddings serve as input and output: an item's score is the inner
    product of its embedding and z.
    """

    def __init__(self, n_items: int, dim: int, window: int, dropout: float, **config: int | float | str | dict) -> None:
        super().__init__(n_items=n_items, dim=dim, window=window, dropout=dropout, **config)
        self.window = window
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=n_items)
        self.dropout = nn.Dropout(dropout)

    def _start_small(self) -> None:
        """Initialise all embeddings so small that the first scores are nearly equal; the padding's is zero."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.items.weight[self.n_items])

    @property
    def item_embeddings(self) -> Tensor:
        """(n_items, dim)"""
        return self.items.weight[: self.n_items]

    def read(self, items: Tensor, real: Tensor) -> Tensor:
        """(batch, length, dim) embeddings, (batch, length) bool, false for padding -> (batch, dim), the state z."""
        raise NotImplementedError

    def encode(self, history: Tensor) -> Tensor:
        if history.shape[1] > self.window:
            raise ValueError(
                f"a history of {history.shape[1]} items is longer than the window of {self.window}: cut it"
            )
        return self.read(self.items(history), history != self.n_items)

    def score_all(self, history: Tensor) -> Tensor:
        return self.encode(history) @ self.item_embeddings.T

    def collate(self, rows: list[np.ndarray]) -> Tensor:
        """Rows of window + 1 item ids, the last one being the target -> (batch, window + 1)."""
        return torch.from_numpy(np.stack(rows))

    def forward(self, batch: Tensor, progress: float = 0.0, step_seed: int = 0) -> Tensor:
        """Mean cross entropy of the target over all items."""
        return functional.cross_entropy(self.score_all(batch[:, :-1]), batch[:, -1])


class Block(nn.Module):
    """A Transformer layer, normalised after each sublayer, with outputs for the last `n` positions alone."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor, n: int) -> Tensor:
        """(batch, length, dim), (batch * heads, query, key) bool, true where attention is forbidden -> (batch, n, dim)

        x: states of the layer before.
        """
        last = x[:, -n:]
        attended, _ = self.attention(last, x, x, attn_mask=hidden[:, -n:], need_weights=False)
        last = self.norms[0](last + self.dropout(attended))
        return self.norms[1](last + self.dropout(self.feed_forward(last)))


class SASRec(SequenceModel):
    """Self-attentive sequential recommendation (Kang and McAuley 2018).

    Padding is never attended to; a padded position sees itself alone, and nothing sees it.
    """

    def __init__(
        self,
        n_items: int,
        dim: int = 64,
        window: int = 10,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(n_items, dim, window, dropout, layers=layers, heads=heads)
        self.heads = heads
        self.positions = nn.Embedding(window, dim)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self._start_small()

    def read(self, items: Tensor, real: Tensor) -> Tensor:
        return self.states(items, real, n=1)[:, 0]

    def states(self, items: Tensor, real: Tensor, n: int) -> Tensor:
        """States after the last n items: (batch, length, dim), (batch, length) bool -> (batch, n, dim)."""
        length = real.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=real.device)
        hidden = ~(past & real[:, None, :] | itself).repeat_interleave(self.heads, dim=0)  # (batch * heads, query, key)
        place = torch.arange(self.window - length, self.window, device=real.device)
        x = self.dropout(self.norm(items + self.positions(place)))
        for block in self.blocks[:-1]:
            x = block(x, hidden, length)
        return self.blocks[-1](x, hidden, n)


class GRU4Rec(SequenceModel):
    """A gated recurrent network (Hidasi et al. 2016; one layer).

    Left out: output embeddings of their own and the ranking losses on sampled items, both made for catalogues
    that full cross entropy cannot afford.
    """

    def __init__(self, n_items: int, dim: int = 64, window: int = 10, hidden: int = 128, dropout: float = 0.3) -> None:
        super().__init__(n_items, dim, window, dropout, hidden=hidden)
        self.gru = nn.GRU(dim, hidden, bias=False, batch_first=True)  # biases would hide small embeddings at first
        self.last = nn.Linear(hidden, dim)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)
        self._start_small()

    def read(self, items: Tensor, real: Tensor) -> Tensor:
        length = real.sum(1)  # (batch,)
        place = torch.arange(real.shape[1], device=real.device) - length[:, None]
        first = (place % real.shape[1])[..., None].expand_as(items)  # the real items first, then the padding
        states, _ = self.gru(self.dropout(items.gather(1, first)))
        return self.last(states[torch.arange(len(states), device=real.device), length - 1])


class Caser(SequenceModel):
    """Convolutions over the window (Tang and Wang 2018).

    The window is an image of `window` x dim: `filters` horizontal filters of each height up to `heights` see that
    many items in a row, their largest answer counts; `vertical` filters weigh the window's items for each dimension.
    Left out: user embeddings, as test users are new; output embeddings of their own; the ReLU of the last layer,
    because a state that is never negative could not be the opposite of an embedding; targets beyond the next item.
    """

    def __init__(
        self,
        n_items: int,
        dim: int = 64,
        window: int = 10,
        filters: int = 16,
        heights: int = 4,
        vertical: int = 4,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(n_items, dim, window, dropout, filters=filters, heights=heights, vertical=vertical)
        heights = range(1, min(heights, window) + 1)
        self.horizontal = nn.ModuleList(nn.Conv1d(dim, filters, height) for height in heights)
        self.vertical = nn.Linear(window, vertical)
        self.last = nn.Linear(len(heights) * filters + vertical * dim, dim)
        self._start_small()

    def read(self, items: Tensor, real: Tensor) -> Tensor:
        image = (items * real[..., None]).mT  # (batch, dim, length)
        image = functional.pad(image, (self.window - image.shape[2], 0))  # (batch, dim, window)
        seen = [filters(image).relu().amax(2) for filters in self.horizontal]  # each (batch, filters)
        weighed = self.vertical(image).flatten(1)  # (batch, dim * vertical)
        return self.last(self.dropout(torch.cat([*seen, weighed], dim=1)))
