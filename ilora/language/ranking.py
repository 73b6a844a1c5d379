"""How a language model scores all candidates of a question: in one forward pass where it can, else in one for each.

    prompt            title A     title B     title C       one row of the batch
    0 1 2 ... n-1     n n+1 ...   n n+1 ...   n n+1 ...     position_ids: each title stands directly after the prompt

A token attends to the prompt and to its own title, never to another candidate.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ilora.data.windows import Row
from ilora.language.prompts import NO_LABEL, PROMPT


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log P of each label, 0 for NO_LABEL: (rows, labels, vocabulary), (rows, labels) -> (rows, labels)."""
    flat = logits.float().flatten(0, 1)
    loss = functional.cross_entropy(flat, labels.flatten(), ignore_index=NO_LABEL, reduction="none")
    return -loss.view_as(labels)


def scores_of_answers(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, np.ndarray]:
    """(rows, answers): log P(title and end | prompt), and whether greedy decoding writes this title.

    logits: (rows, labels, vocabulary) for a batch of `Prompts`, with the same number of answers in each row.
    """
    answers = torch.arange(int(batch["column"].max()) + 1, device=logits.device)
    belongs = batch["column"][..., None] == answers  # (rows, labels, answers)
    scores = log_likelihood(logits, batch["labels"])[..., None].where(belongs, 0).sum(1)
    differs = (logits.argmax(-1) != batch["labels"])[..., None] & belongs
    return scores, ~differs.any(1).cpu().numpy()


@torch.no_grad()
def scores(model: nn.Module, rows: list[Row], one_pass: bool) -> tuple[Tensor, np.ndarray]:
    """`scores_of_answers` for all candidates of each row, from a `LanguageRecommender`."""
    if one_pass:
        batch = model.batch(rows, [candidates for _, candidates, _ in rows])
        mask = attention_mask(batch, model.language_model.config.get_text_config(), model.embedding.weight.dtype)
        logits = model.logits(batch, attention_mask=mask, position_ids=batch["position_ids"])
        return scores_of_answers(logits, batch)
    parts = []
    for items in zip(*(candidates for _, candidates, _ in rows), strict=True):
        batch = model.batch(rows, [[item] for item in items])
        parts.append(scores_of_answers(model.logits(batch), batch))
    values, written = zip(*parts, strict=True)
    return torch.cat(values, dim=1), np.concatenate(written, axis=1)


def why_not_in_one_pass(model: nn.Module) -> str:
    """Why this model's scores in one pass differ from those one by one, tried on a long question; "" if they agree."""
    rows = [long_question(model)]
    expected, _ = scores(model, rows, one_pass=False)
    try:
        values, _ = scores(model, rows, one_pass=True)
    except Exception as error:  # whatever a model says to masks or positions that it does not know
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    tolerance = 1e-3 if model.embedding.weight.dtype == torch.float32 else 4e-2  # of log P; other masks: more
    agree = torch.allclose(values, expected, rtol=tolerance, atol=tolerance)
    return "" if agree else "it does not follow the given mask and positions"


def long_question(model: nn.Module) -> Row:
    """A question of at least 300 tokens, and longer than a sliding window of up to 1,024, if there is room."""
    window = getattr(model.language_model.config.get_text_config(), "sliding_window", None) or 0
    long, candidates = max(300, window + 50 if window <= 1024 else 0), np.arange(min(3, len(model.prompts.titles)))
    short = model.length((candidates[:0], candidates, 0))
    room = (model.positions or 10**6) - short - 4 * model.prompts.longest
    each = model.length((candidates, candidates, 0)) - short
    return np.tile(candidates, max(min(long, room) // each, 0)), candidates, 0


def attention_mask(batch: dict[str, Tensor], config: object, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """(rows, 1, query, key) to add to attention scores: 0 where a query may attend to a key, else the least number.

    Models whose layers differ, some with a sliding window, get a mask for each type of layer.
    """
    part, position = batch["part"], batch["position_ids"]
    before = torch.ones(2 * part.shape[1:], dtype=torch.bool, device=part.device).tril()
    sees = before & ((part[:, None] == PROMPT) | (part[:, None] == part[:, :, None]))  # (rows, query, key)
    window = getattr(config, "sliding_window", None) or part.shape[1]
    near = position[:, :, None] - position[:, None] < window
    masks = {}
    for kind in set(getattr(config, "layer_types", None) or ["sliding_attention"]):
        hidden = ~(sees if kind == "full_attention" else sees & near)
        masks[kind] = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        masks[kind] = masks[kind].masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else masks.popitem()[1]
