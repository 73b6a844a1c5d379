"""The baselines of the table without attention or text: Popularity, GRU4Rec and Caser."""

import torch
from torch import Tensor, nn

from ilora.data.dataset import Dataset
from ilora.recommenders.base import Recommender, SequenceModel


class Popularity(Recommender):
    """Scores an item by the number of its events in the train split."""

    def __init__(self, n_items: int) -> None:
        super().__init__(n_items=n_items)
        self.register_buffer("counts", torch.zeros(n_items))

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Popularity":
        """Count the events of the training users."""
        train = (dataset.users["split"] == "train").to_numpy()[dataset.events["user"]]
        model = cls(len(dataset.items))
        model.counts += torch.tensor(dataset.events["item"][train].to_numpy()).bincount(minlength=model.n_items)
        return model.eval()

    def score_all(self, history: Tensor) -> Tensor:
        return self.counts.expand(len(history), -1)


class GRU4Rec(SequenceModel):
    """A gated recurrent unit: h_t = GRU(e_{i_t}, h_{t-1}), z = W h_T + b (Hidasi et al. 2016, Eqs. 2 to 5)."""

    def __init__(self, n_items: int, dim: int = 64, window: int = 10, hidden: int = 128, dropout: float = 0.3) -> None:
        super().__init__(n_items, dim, window, dropout, hidden=hidden)
        self.gru = nn.GRU(dim, hidden, bias=False, batch_first=True)  # biases would outweigh the small embeddings
        self.last = nn.Linear(hidden, dim)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)
        self._init_embeddings()

    def final_state(self, items: Tensor, mask: Tensor) -> Tensor:
        padding_last = (~mask).int().argsort(dim=1, stable=True)  # (batch, length)
        states, _ = self.gru(self.dropout(items.gather(1, padding_last[..., None].expand_as(items))))
        return self.last(states[torch.arange(len(states), device=mask.device), mask.sum(1) - 1])


class Caser(SequenceModel):
    """Convolutions over the (window, dim) matrix of item embeddings (Tang and Wang 2018, Eqs. 3 to 9).

    Horizontal filters of each height up to `heights` are max-pooled, vertical ones are weighted sums of the items.
    The paper also has user embeddings, separate output embeddings, further targets, and a ReLU before the output.
    """

    def __init__(self, n_items: int, dim: int = 64, window: int = 10, filters: int = 16, heights: int = 4,
                 vertical: int = 4, dropout: float = 0.3) -> None:  # fmt: skip
        super().__init__(n_items, dim, window, dropout, filters=filters, heights=heights, vertical=vertical)
        heights = min(heights, window)
        self.horizontal = nn.ModuleList(nn.Conv1d(dim, filters, height) for height in range(1, heights + 1))
        self.vertical = nn.Linear(window, vertical)
        self.last = nn.Linear(heights * filters + vertical * dim, dim)
        self._init_embeddings()

    def final_state(self, items: Tensor, mask: Tensor) -> Tensor:
        image = nn.functional.pad((items * mask[..., None]).mT, (self.window - items.shape[1], 0))  # (b, dim, window)
        horizontal = [convolution(image).relu().amax(2) for convolution in self.horizontal]  # each (batch, filters)
        vertical = self.vertical(image).flatten(1)  # (batch, dim * vertical)
        return self.last(self.dropout(torch.cat([*horizontal, vertical], dim=1)))
