"""Greedy writing with drafts: what `generate` writes token by token, read in a few forward passes.

Most rows write one of the titles that were offered. So the rest of a title that begins as the row does is put behind
the row as a draft, and one pass says what the model would write at each of its tokens. Drafted tokens stand as far as
they are what the model writes, and so does the token that it writes behind them; the others are masked from then on.
What is written is the model's own greedy choice throughout, whatever the draft was.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ilora.language_model import only_last

Tokens = list[int]


@torch.no_grad()
def write(
    model: PreTrainedModel, embeds: Tensor, mask: Tensor, offered: Sequence[Sequence[Tokens]], **guidance: Tensor
) -> list[Tokens]:
    """Each row's greedy tokens: to one that ends for the model, or one more than the longest answer offered.

    embeds (batch, tokens, hidden) and mask (batch, tokens): prompts, padded on the left; offered: the answers that
    each row may draft, without an end; guidance: tensors by row, for each forward pass.
    """
    cache, end = DynamicCache(config=model.config), model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    limits = [1 + max(map(len, answers)) for answers in offered]
    drafts = _may_draft(cache, mask.shape[1] + max(limits) ** 2)
    written = [[token] for token in _begin(model, embeds, mask, cache, guidance)]
    rows = list(range(len(written)))  # those that the cache has
    while going := [n for n, row in enumerate(rows) if _is_open(written[row], limits[row], ends)]:
        if len(going) < len(rows):
            keep = torch.tensor(going, device=mask.device)
            rows, mask, guidance = [rows[n] for n in going], mask[keep], {k: z[keep] for k, z in guidance.items()}
            cache.batch_select_indices(keep)
        draft = [_rest(written[row], offered[row]) if drafts else [] for row in rows]
        fed = [[written[row][-1], *rest] for row, rest in zip(rows, draft, strict=True)]
        own = _go_on(model, fed, mask, cache, guidance)
        stands = [_agreed(*pair, ends) for pair in zip(draft, own, strict=True)]
        for row, tokens, length in zip(rows, own, stands, strict=True):
            written[row] += tokens[: length + 1]
        mask = torch.cat([mask, _first([1 + length for length in stands], len(own[0]), mask)], dim=1)
    return written


def _begin(
    model: PreTrainedModel, embeds: Tensor, mask: Tensor, cache: DynamicCache, guidance: dict[str, Tensor]
) -> Tokens:
    """The likeliest token behind each prompt, which the cache then holds."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
    with only_last(model, keep=1):
        logits = model(**read, past_key_values=cache, use_cache=True, **guidance).logits
    return logits[:, -1].argmax(-1).tolist()


def _go_on(
    model: PreTrainedModel, fed: list[Tokens], mask: Tensor, cache: DynamicCache, guidance: dict[str, Tensor]
) -> list[Tokens]:
    """The likeliest token behind each token of `fed`, which goes on what the cache holds; anything behind padding."""
    size, width = [len(tokens) for tokens in fed], max(map(len, fed))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=mask.device)
    real = _first(size, width, mask)
    positions = mask.sum(1, keepdim=True) - 1 + real.cumsum(1)  # padding at the last one: within the model's range
    read = {"input_ids": tokens, "attention_mask": torch.cat([mask, real], dim=1), "position_ids": positions}
    return model(**read, past_key_values=cache, use_cache=True, **guidance).logits.argmax(-1).tolist()


def _is_open(written: Tokens, limit: int, ends: set[int]) -> bool:
    return len(written) < limit and written[-1] not in ends


def _first(number: list[int], width: int, like: Tensor) -> Tensor:
    """(rows, width): 1 in each row's first `number` places, else 0."""
    number = torch.tensor(number, device=like.device)
    return (torch.arange(width, device=like.device) < number[:, None]).to(like.dtype)


def _rest(begun: Tokens, answers: Sequence[Tokens]) -> Tokens:
    """The rest of the first answer that begins so; nothing if none does."""
    return next((answer[len(begun) :] for answer in answers if answer[: len(begun)] == begun), [])


def _agreed(draft: Tokens, own: Tokens, ends: set[int]) -> int:
    """How many drafted tokens stand: to the first that is not the model's own or that ends its answer."""
    pairs = zip(draft, own, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other or other in ends), len(draft))


def _may_draft(cache: DynamicCache, tokens: int) -> bool:
    """Whether rejected tokens can be masked: attention that sees all of so many tokens, no state they would change."""
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return plain and all(getattr(layer, "sliding_window", tokens) >= tokens for layer in cache.layers)
