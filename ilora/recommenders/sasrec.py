"""SASRec: self-attention over item ids."""

import torch
from torch import Tensor, nn

from ilora.recommenders.base import SequenceModel


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
