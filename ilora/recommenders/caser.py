"""Caser: convolutions over a window of item ids."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ilora.recommenders.base import SequenceModel


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
