"""SASRec: self-attention over the items of a history."""

import torch
from torch import Tensor, nn

from ilora.recommenders.base import SequenceModel


class Block(nn.Module):
    """A Transformer layer: a = LayerNorm(x + Attention(x)), then y = LayerNorm(a + FeedForward(a))."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, forbidden: Tensor, n: int) -> Tensor:
        """Compute the last n positions: (batch, length, dim) -> (batch, n, dim)."""
        queries = x[:, -n:]
        attended, _ = self.attention(queries, x, x, attn_mask=forbidden[:, -n:], need_weights=False)
        a = self.norms[0](queries + self.dropout(attended))
        return self.norms[1](a + self.dropout(self.feed_forward(a)))


class SASRec(SequenceModel):
    """Self-attentive sequential recommendation (Kang and McAuley 2018, Section 3).

        x_t = LayerNorm(e_{i_t} + p_t)              item i_t of the history and its position (their Eq. 1)
        h   = Block(... Block(x))                   position t attends to positions 1 to t (Eqs. 2 to 5)
        z   = h_T,   score of item i = e_i . z      the last state; embeddings are shared with the input

    As in BERT4Rec, blocks normalise after each sublayer and use GELU; the paper normalises before and uses ReLU.
    """

    def __init__(self, n_items: int, dim: int = 64, window: int = 10, layers: int = 2, heads: int = 2,
                 dropout: float = 0.3) -> None:  # fmt: skip
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
        self._init_embeddings()

    def final_state(self, items: Tensor, mask: Tensor) -> Tensor:
        return self.states(items, mask, n=1)[:, 0]

    def states(self, items: Tensor, mask: Tensor, n: int) -> Tensor:
        """States h of the last n positions: (batch, length, dim), (batch, length) -> (batch, n, dim)."""
        length = mask.shape[1]
        x = self.dropout(self.norm(items + self.positions.weight[-length:]))
        past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=mask.device)  # padding needs something to attend to
        allowed = past & mask[:, None, :] | itself  # (batch, query, key)
        forbidden = ~allowed.repeat_interleave(self.heads, dim=0)  # (batch * heads, query, key)
        for block in self.blocks[:-1]:
            x = block(x, forbidden, length)
        return self.blocks[-1](x, forbidden, n)
