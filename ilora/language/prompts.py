"""Prompts: a history, twenty candidates and a question, joined from titles that are tokenised once.

    Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is: Y</s>

A hybrid prompt has an item token after each title (`A<item>; B<item>`), for the recommender's embedding (Eq. 6).
"""

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ilora.data.dataset import one_line, title_key
from ilora.errors import UserError

ITEM_TOKEN = "<item>"
NO_LABEL = -100
PROMPT, PADDING = -1, -2  # `part` of tokens that belong to no answer
FILL = {"input_ids": 0, "part": PADDING, "labels": NO_LABEL, "at": 0, "column": PADDING}  # value of padding


def wording(noun: str, verb: str) -> tuple[str, str, str]:
    """The text before the history, before the candidates and before the answer."""
    return f"Each {noun} this person {verb}, in order:", f". The next {noun} is one of:", f". The next {noun} is:"


def prompt_text(history: Sequence[str], candidates: Sequence[str], noun: str, verb: str, mark: str = ITEM_TOKEN) -> str:
    """The prompt as text, with a mark after each title; `Prompts` writes the same as token ids."""
    opening, offer, question = wording(noun, verb)
    first, second = ("; ".join(f"{title}{mark}" for title in titles) for titles in (history, candidates))
    return f"{opening} {first}{offer} {second}{question}"


class Prompts:
    """Writes prompts of items with unique titles.  Raises UserError if the tokenizer cannot write or end a title."""

    pad_to_multiple_of = 1  # tokens, on the right; multiples give `forward` fewer different shapes

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], noun: str, verb: str):
        if tokenizer.eos_token_id is None:
            raise UserError("the base model's tokenizer has no end token for the end of an answer: set its eos_token")
        self.has_item_token = ITEM_TOKEN in tokenizer.get_vocab()
        if not self.has_item_token:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens(ITEM_TOKEN, special_tokens=True)
        self.tokenizer, self.titles, self.words = tokenizer, [one_line(title) for title in titles], (noun, verb)
        self.end, self.item_token = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ITEM_TOKEN)
        opening, offer, question = wording(noun, verb)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.opening = start + tokenizer(opening, add_special_tokens=False).input_ids
        self.offer, self.question, self.separator = self._continuations([offer, question, ";"])
        self.answers = self._continuations([f" {title}" for title in self.titles])
        self.longest = max(map(len, self.answers)) + 1  # tokens of an answer, with the end
        # each title, written as an answer, must read back as itself: see `read_answer`, with all titles offered
        expected = [title_key(title) for title in self.titles]
        count, triples = Counter(expected), zip(self.titles, expected, self.answers, strict=True)
        wrong = [title for title, text, tokens in triples
                 if not text or count[text] > 1 or title_key(first_line(self.read(tokens))) != text]  # fmt: skip
        if wrong:
            problem = f"{len(wrong)} of {len(self.titles)} titles do not read back when this tokenizer writes them"
            raise UserError(f"{problem}, such as {', '.join(map(repr, wrong[:3]))}: change them, or the base model")

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they follow other text, here a line break, which never merges with what follows."""
        before = self.tokenizer("\n", add_special_tokens=False).input_ids
        ids = self.tokenizer([f"\n{text}" for text in texts], add_special_tokens=False).input_ids
        return [tokens[len(before) :] for tokens in ids]

    def read(self, tokens: Sequence[int] | Tensor) -> str:  # an answer
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def join(self, items: Sequence[int], hybrid: bool) -> list[int]:
        """Token ids of the titles "A; B; C", in a hybrid prompt with the item token after each."""
        tokens, mark = [], [self.item_token] if hybrid else []
        for item in items:
            tokens += [*(self.separator if tokens else []), *self.answers[item], *mark]
        return tokens

    def write(self, history: Sequence[int], candidates: Sequence[int], hybrid: bool) -> list[int]:
        """Token ids of one prompt, up to the question; the history may be padded, as in `data.questions`."""
        history = [item for item in history if item != len(self.titles)]
        return [*self.opening, *self.join(history, hybrid), *self.offer, *self.join(candidates, hybrid), *self.question]

    def batch(
        self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]] = (), hybrid: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Prompts of item ids, each followed by the titles of its `answers`, padded on the right.

        Without `answers` the padding is on the left, as `generate` needs it. (batch, tokens): input_ids; part, the
        answer that a token belongs to, PROMPT or PADDING. (batch, labels): labels, the tokens of all answers, each with
        the end token, or NO_LABEL; at, the token that predicts a label; column, the answer that a label belongs to.
        (item tokens,): items, and places, where their tokens are in the flattened batch.
        """
        prompts = [self.write(*row, hybrid) for row in zip(histories, candidates, strict=True)]
        rows = [self._row(*row) for row in zip(prompts, answers or [()] * len(prompts), strict=True)]
        items = np.concatenate([part for row in zip(histories, candidates, strict=True) for part in row])
        batch = {"items": torch.from_numpy(items[(items != len(self.titles)) & hybrid]).long()}
        side, multiple = ("right", self.pad_to_multiple_of) if answers else ("left", 1)
        for name, value in FILL.items():
            padded = pad_sequence([torch.from_numpy(np.array(row[name], int)) for row in rows], True, value, side)
            extra = -padded.shape[1] % (multiple if name in ("input_ids", "part") else 1)
            batch[name] = nn.functional.pad(padded, (0, extra), value=value)
        return batch | {"places": (batch["input_ids"].flatten() == self.item_token).nonzero()[:, 0]}

    def _row(self, prompt: list[int], answers: Sequence[int]) -> dict[str, list[int]]:
        """A row of `batch`, without padding."""
        row = {"input_ids": [*prompt], "part": [PROMPT] * len(prompt), "labels": [], "at": [], "column": []}
        for column, item in enumerate(answers):
            title, start = self.answers[item], len(row["input_ids"])
            row["input_ids"] += title
            row["part"] += [column] * len(title)
            row["labels"] += [*title, self.end]
            row["at"] += [len(prompt) - 1, *range(start, start + len(title))]
            row["column"] += [column] * (len(title) + 1)
        return row


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def read_answer(text: str, titles: Sequence[str]) -> int | None:
    """The column of the offered title that an answer names, or None for an invalid answer.

    An answer is valid if its first line is an offered title (ignoring case and spacing) or, failing that, if exactly
    one offered title occurs in it, the rule of the released code.
    """
    offered, first = [title_key(title) for title in titles], title_key(first_line(text))
    if first in offered:
        return offered.index(first)
    inside = [column for column, title in enumerate(offered) if title in title_key(text)]
    return inside[0] if len(inside) == 1 else None
