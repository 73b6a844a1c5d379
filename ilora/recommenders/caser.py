"""Caser: convolutions over the items of a history."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ilora.recommenders.base import SequenceModel


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
        image = (items * mask[..., None]).mT  # (batch, dim, length)
        image = functional.pad(image, (self.window - image.shape[2], 0))  # (batch, dim, window)
        horizontal = [convolution(image).relu().amax(2) for convolution in self.horizontal]  # each (batch, filters)
        vertical = self.vertical(image).flatten(1)  # (batch, dim * vertical)
        return self.last(self.dropout(torch.cat([*horizontal, vertical], dim=1)))
