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

from ilora import artifacts
from ilora.errors import UserError


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
        """Scores of each row's candidates, (rows, candidates); a row is one of `data.Questions`."""
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
        artifacts.write_json(Path(folder, "config.json"), {"class": type(self).__name__, **self.config})
        artifacts.write_atomic(Path(folder, "model.safetensors"), safetensors.torch.save(self.state_dict()))

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
            raise UserError(f"cannot read a {cls.__name__} from {folder} ({why}): train it again") from error
        return model.eval()


def _family(cls: type[Recommender]) -> Iterator[type[Recommender]]:
    yield cls
    for kind in cls.__subclasses__():
        yield from _family(kind)


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
