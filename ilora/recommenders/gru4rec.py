"""GRU4Rec: a recurrent network over the items of a history."""

import torch
from torch import Tensor, nn

from ilora.recommenders.base import SequenceModel


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
