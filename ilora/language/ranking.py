"""How a language model scores all candidates of a question: in one forward pass where it can, else in one for each.

prompt            title A     title B     title C       one row of the batch
0 1 2 ... n-1     n n+1 ...   n n+1 ...   n n+1 ...     positions; a title attends to the prompt and to itself
"""

import logging

import numpy as np
import torch
from torch import Tensor, nn

from ilora.data.windows import Row
from ilora.language.base_models import quantization
from ilora.language.prompts import NO_LABEL, PADDING, PROMPT, first_line

LOGITS = 2**29  # the most at once, which bounds the memory: 2 GiB in float32


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log P of each label, 0 for NO_LABEL: (rows, labels, vocabulary), (rows, labels) -> (rows, labels)."""
    flat = logits.float().flatten(0, 1)
    return -nn.functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=NO_LABEL).view_as(labels)


@torch.no_grad()
def scores(model: nn.Module, rows: list[Row], one_pass: bool) -> tuple[Tensor, Tensor]:
    """(rows, candidates) from a `LanguageRecommender`: log P(title and end | prompt), and whether greedy writes it."""
    offered = [candidates for _, candidates, _ in rows]
    tokens = max(sum(len(model.prompts.answers[item]) + 1 for item in items) for items in offered)
    if len(rows) > (at_once := max(LOGITS // (tokens * len(model.embedding.weight)), 1)):
        parts = [scores(model, rows[start : start + at_once], one_pass) for start in range(0, len(rows), at_once)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    parts = [offered] if one_pass else [[[item] for item in items] for items in zip(*offered, strict=True)]
    values, written = zip(*(_scores(model, rows, answers) for answers in parts), strict=True)
    return torch.cat(values, dim=1), torch.cat(written, dim=1)


def _scores(model: nn.Module, rows: list[Row], answers: list) -> tuple[Tensor, Tensor]:
    """`scores` of some candidates, the same number in each row; a single one needs no mask."""
    batch = model.batch(rows, answers)
    config, dtype = model.language_model.config.get_text_config(), model.embedding.weight.dtype
    inputs = mask_and_positions(batch["part"], config, dtype) if len(answers[0]) > 1 else {}
    logits = model.logits(batch, **inputs)  # (rows, labels, vocabulary)
    belongs = batch["column"][..., None] == torch.arange(len(answers[0]), device=logits.device)
    values = log_likelihood(logits, batch["labels"])[..., None].where(belongs, 0).sum(1)
    return values, ~((logits.argmax(-1) != batch["labels"])[..., None] & belongs).any(1)


def fits_one_pass(model: nn.Module) -> bool:
    """Whether a model's scores in one pass equal those one by one, tried on a long question; the log says why not."""
    rows, training, kind = [long_question(model)], model.training, model.language_model.config.model_type
    expected, _ = scores(model.eval(), rows, one_pass=False)
    exact = model.embedding.weight.dtype == torch.float32 and not quantization(model.language_model)
    tolerance = 1e-3 if exact else 4e-2  # of log P
    try:
        values, _ = scores(model, rows, one_pass=True)
        fits, reason = torch.allclose(values, expected, tolerance, tolerance), "it ignores the mask or the positions"
    except Exception as error:  # models raise many kinds
        fits, reason = False, f"{type(error).__name__}: {first_line(str(error))}"
    model.train(training)
    if not fits:
        logging.getLogger(__name__).warning("%s needs a pass for each candidate, which is slow (%s)", kind, reason)
    return fits


def long_question(model: nn.Module) -> Row:
    """A question of at least 300 tokens, and longer than a sliding window of up to 1,024, if there is room."""
    window = getattr(model.language_model.config.get_text_config(), "sliding_window", None) or 0
    wanted, candidates = max(300, window + 50 if window <= 1024 else 0), np.arange(min(3, len(model.prompts.titles)))
    short = model.length((candidates[:0], candidates, 0))
    room = model.positions - short - 4 * model.prompts.longest
    repeats = min(wanted, room) // (model.length((candidates, candidates, 0)) - short)
    return np.tile(candidates, max(repeats, 0)), candidates, 0


def mask_and_positions(part: Tensor, config: object, dtype: torch.dtype) -> dict[str, Tensor | dict[str, Tensor]]:
    """The language model's attention_mask and position_ids (rows, tokens), for `part` of a batch of `Prompts`.

    A mask (rows, 1, query, key) is 0 where a query may attend to a key, else the least number; one for each layer type.
    """
    before = torch.ones(2 * part.shape[1:], dtype=torch.bool, device=part.device).tril()
    sees = before & ((part[:, None] == PROMPT) | (part[:, None] == part[:, :, None]))  # (rows, query, key)
    position = (sees.sum(-1) - 1).masked_fill(part == PADDING, 0)
    near = position[:, :, None] - position[:, None] < (getattr(config, "sliding_window", None) or part.shape[1])
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    seen = {kind: sees if kind == "full_attention" else sees & near for kind in kinds}
    zero, least = torch.zeros(sees.shape, dtype=dtype, device=sees.device), torch.finfo(dtype).min
    masks = {kind: zero.masked_fill(~keys, least)[:, None] for kind, keys in seen.items()}
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1], "position_ids": position}
