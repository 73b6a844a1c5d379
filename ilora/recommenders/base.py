"""The interface of all recommenders, and what the neural ones share."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors.torch
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor, nn

from ilora import artifacts
from ilora.errors import UserError


class Recommender(nn.Module):
    """Scores items by `score_all`: (batch, window) ids, oldest first, left-padded by `n_items` -> (batch, n_items)."""

    window = 1  # the number of most recent items that the model uses
    kinds: ClassVar[dict[str, type["Recommender"]]] = {}  # all subclasses by name

    def __init_subclass__(cls) -> None:
        Recommender.kinds[cls.__name__] = cls

    def __init__(self, **config: int | float | str | dict) -> None:
        super().__init__()
        self.config = config  # the constructor's arguments, for `from_pretrained`
        self.n_items = config["n_items"]

    @property
    def device(self) -> torch.device:
        return next(iter(self.state_dict().values())).device

    def stack(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Stack histories as (batch, window), cut to the model's window; shorter ones are filled with padding."""
        padding = [self.n_items] * self.window
        return torch.from_numpy(np.array([[*padding, *history][-self.window :] for history in histories]))

    @torch.no_grad()
    def score(self, rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
        """Score the candidates of rows of `data.Questions`: (rows, candidates)."""
        histories, candidates, _ = zip(*rows, strict=True)
        scores = self.score_all(self.stack(histories).to(self.device))
        return scores.gather(1, torch.from_numpy(np.stack(candidates)).to(self.device))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """All parameters, with L2 regularisation as in Adam: the gradient gets weight_decay times the weights."""
        return [{"params": list(self.parameters()), "weight_decay": weight_decay, "decoupled_weight_decay": False}]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`."""
        artifacts.write_json(Path(folder, "config.json"), {"class": type(self).__name__, **self.config})
        artifacts.write_atomic(Path(folder, "model.safetensors"), safetensors.torch.save(self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Recommender":
        """Load a saved model of this class or a subclass, in eval mode; anything else raises UserError."""
        try:
            config = json.loads(Path(folder, "config.json").read_text("utf-8"))
            kind = cls.kinds[config.pop("class")]
            if not issubclass(kind, cls):
                raise ValueError(f"config.json names {kind.__name__}, not {cls.__name__}")
            model = kind(**config)
            model.load_state_dict(safetensors.torch.load_file(Path(folder, "model.safetensors")))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot read a {cls.__name__} from {folder} ({reason}): train it again") from error
        return model.eval()


class SequenceModel(Recommender):
    """A network that encodes a history as z of iLoRA's Eq. 11, trained on p(i | history) = softmax_i(e_i . z).

    The item embeddings e are also the network's input. A subclass implements `final_state(items, mask)`: embeddings
    (batch, length, dim) and a mask (batch, length), False for padding -> (batch, dim).
    """

    def __init__(self, n_items: int, dim: int, window: int, dropout: float, **config: int | float | str | dict) -> None:
        super().__init__(n_items=n_items, dim=dim, window=window, dropout=dropout, **config)
        self.window = window
        self.items = nn.Embedding(n_items + 1, dim, padding_idx=n_items)
        self.dropout = nn.Dropout(dropout)

    def _init_embeddings(self) -> None:
        """Start with embeddings so small that all items score nearly the same."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.items.weight[self.n_items])

    @property
    def item_embeddings(self) -> Tensor:
        """(n_items, dim)"""
        return self.items.weight[: self.n_items]

    def encode(self, history: Tensor) -> Tensor:
        """Represent each history as a vector z: (batch, window) -> (batch, dim)."""
        if history.shape[1] > self.window:
            raise ValueError(f"cut the history of {history.shape[1]} items to the window of {self.window}")
        return self.final_state(self.items(history), history != self.n_items)

    def score_all(self, history: Tensor) -> Tensor:
        return self.encode(history) @ self.item_embeddings.T

    def collate(self, rows: list[np.ndarray]) -> Tensor:
        """Stack training rows: (batch, window + 1) item ids, the target last."""
        return torch.from_numpy(np.stack(rows))

    def forward(self, batch: Tensor, progress: float = 0.0, step_seed: int = 0) -> Tensor:
        """Mean cross entropy of the targets over all items."""
        return nn.functional.cross_entropy(self.score_all(batch[:, :-1]), batch[:, -1])


def k_means(z: np.ndarray, count: int, seed: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,), centres (count, dim) of z (n, dim), the best of ten k-means; UserError unless each has two users."""
    z, rng, starts = np.asarray(z, float), np.random.default_rng(seed), []
    for _ in range(10 if len(np.unique(z, axis=0)) >= count else 0):
        with suppress(ClusterError):  # a cluster became empty: discard this start
            centres, labels = kmeans2(z, count, iter=25, minit="++", missing="raise", rng=rng)
            if all(len(np.unique(users[labels == label])) > 1 for label in range(count)):
                starts.append((((z - centres[labels]) ** 2).sum(), labels, centres))
    if not starts:
        raise UserError(f"{len(z)} sequences cannot be divided into {count} clusters: use more sequences")
    return min(starts, key=lambda start: start[0])[1:]
