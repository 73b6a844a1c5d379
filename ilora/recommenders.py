"""Sequence recommenders without language: popularity and SASRec, behind one contract.

A history is a row of item ids, oldest first, filled up on the left with the padding id `n_items`.
"""

import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ilora import runs
from ilora.data import CANDIDATES, Dataset, Sequences


class Recommender(nn.Module):
    """What every recommender can do; a subclass gives `score_all`, and `encode` where it has states."""

    def __init__(self, **config: int | float) -> None:
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`."""
        runs.write_json(Path(folder, "config.json"), {"class": type(self).__name__, **self.config})
        runs.write_atomic(Path(folder, "model.safetensors"), safetensors.torch.save(self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Recommender":
        """Read what `save_pretrained` wrote, in eval mode. Raises UserError for anything else."""
        try:
            config = json.loads(Path(folder, "config.json").read_text("utf-8"))
            if config.pop("class") != cls.__name__:
                raise KeyError(f"config.json names no {cls.__name__}")
            model = cls(**config)
            model.load_state_dict(safetensors.torch.load_file(Path(folder, "model.safetensors")))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise runs.UserError(f"cannot read a {cls.__name__} from {folder} ({why}): train it again") from error
        return model.eval()


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


class SASRec(Recommender):
    """Self-attentive sequential recommendation (Kang and McAuley 2018) with full-catalogue cross entropy.

    `encode` gives z of iLoRA's Eq. 11, the state after the history's last item. Item embeddings serve as
    input and output. Padding is never attended to; a padded position sees itself alone, and nothing sees it.
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
        super().__init__(n_items=n_items, dim=dim, window=window, layers=layers, heads=heads, dropout=dropout)
        self.window, self.heads = window, heads
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=n_items)
        self.positions = nn.Embedding(window, dim)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(dim, heads, dim, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.items.weight[n_items])

    @property
    def item_embeddings(self) -> Tensor:
        """(n_items, dim)"""
        return self.items.weight[: self.n_items]

    def states(self, history: Tensor) -> Tensor:
        """State after each item: (batch, length <= window) item ids -> (batch, length, dim)."""
        length = history.shape[1]
        if length > self.window:
            raise ValueError(f"a history of {length} items is longer than the window of {self.window}: cut it")
        past = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        seen = past & (history != self.n_items)[:, None, :] | itself  # (batch, query, key)
        place = torch.arange(self.window - length, self.window, device=history.device)
        state = self.dropout(self.items(history) + self.positions(place))
        return self.blocks(state, mask=~seen.repeat_interleave(self.heads, dim=0))

    def encode(self, history: Tensor) -> Tensor:
        return self.states(history)[:, -1]

    def score_all(self, history: Tensor) -> Tensor:
        return self.encode(history) @ self.item_embeddings.T

    def collate(self, rows: list[np.ndarray]) -> Tensor:
        """Rows of window + 1 item ids, the last one being the target -> (batch, window + 1)."""
        return torch.from_numpy(np.stack(rows))

    def forward(self, batch: Tensor, progress: float = 0.0, step_seed: int = 0) -> Tensor:
        """Cross entropy of the next item after every item of a row: summed, over window and rows."""
        history, following = batch[:, :-1], batch[:, 1:]
        real = history != self.n_items
        logits = self.states(history)[real] @ self.item_embeddings.T
        return functional.cross_entropy(logits, following[real], reduction="sum") / history.numel()


class Pieces:
    """Training rows of SASRec: every user's history cut into pieces, anew each epoch.

    A row is (window + 1,) item ids, `window` items and what came after the last; each item in it is a target
    of what came before it in the row. sequences: every window of the users, `data.sequences(min_history=1)`.
    """

    def __init__(self, sequences: Sequences, seed: int) -> None:
        self.sequences, self.seed = sequences, seed
        self.window = sequences.history.shape[1]
        _, self.first, count = np.unique(sequences.user, return_index=True, return_counts=True)
        pieces = -(-(count + self.window - 1) // self.window)  # of each user, enough at every offset
        self.user = np.repeat(np.arange(len(count)), pieces)
        back = np.arange(len(self.user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.last = count[self.user] - 1
        self.end = self.last + self.window - 1 - back * self.window  # latest row of the user's to end at
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shift every cut back by 0 to window - 1 items, at random."""
        shift = np.random.default_rng([self.seed, epoch]).integers(self.window, size=len(self.end))
        self.row = self.first[self.user] + np.clip(self.end - shift, 0, self.last)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, piece: int) -> np.ndarray:
        row = self.row[piece]
        return np.append(self.sequences.history[row], self.sequences.target[row])


def expected_hit_ratio(
    scores: np.ndarray, history: np.ndarray, target: np.ndarray, size: int = CANDIDATES
) -> np.ndarray:
    """Each row's HitRatio@1 over all draws of candidates: how probably the target scores highest of `size`.

    scores (rows, n_items), history (rows, window), target (rows,) -> (rows,). The others are drawn as in
    `data.candidates`: distinct, neither in the history nor the target; a tie is won by lot. Exact: with m
    items to draw from, `better` of them above the target and `ties` equal to it, the mean over j = 0..ties
    of C(m - better - j, size - 1) / C(m, size - 1), two terms by the hockey-stick identity.
    Raises ValueError on NaN scores, which would compare as "not better".
    """
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: the model that made them is broken")
    n_items, row = scores.shape[1], np.arange(len(scores))
    free = np.ones((len(scores), n_items + 1), dtype=bool)  # the last column is padding
    free[row[:, None], history] = False
    free[row, target] = False
    free = free[:, :n_items]
    own = scores[row, target][:, None]
    m, better, ties = free.sum(1), (free & (scores > own)).sum(1), (free & (scores == own)).sum(1)

    def term(x: np.ndarray) -> np.ndarray:  # C(x, size) / C(m, size - 1)
        factors = [np.maximum(x - 1 - j, 0) / (m - j) for j in range(size - 1)]
        return x / size * np.prod(factors, axis=0)

    return (term(m - better + 1) - term(m - better - ties)) / (ties + 1)


@torch.no_grad()
def hit_ratios(
    recommender: Recommender, sequences: Sequences, size: int = CANDIDATES, batch_size: int = 512
) -> np.ndarray:
    """`expected_hit_ratio` of a recommender for each sequence, (n,)."""
    recommender.eval()
    parts = []
    for start in range(0, len(sequences), batch_size):
        part = sequences.take(slice(start, start + batch_size))
        scores = recommender.score_all(torch.from_numpy(part.history).to(recommender.device)).cpu().numpy()
        parts.append(expected_hit_ratio(scores, part.history, part.target, size))
    return np.concatenate(parts)
