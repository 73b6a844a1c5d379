"""GRU4Rec: a recurrent network over item ids."""

import torch
from torch import Tensor, nn

from ilora.recommenders.base import SequenceModel


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
