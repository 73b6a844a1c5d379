"""Prompts: a history, twenty candidates and a question, put together from titles that were tokenised once.

    Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is: Y</s>

A behaviour token after each title (`A<item>; B<item>`) makes the prompt hybrid: the model replaces the token's
embedding by the projected embedding of the recommender (Eq. 6). Left as it is, it is LLaRA's placeholder.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase

from ilora.data.dataset import one_line
from ilora.errors import UserError

ITEM_TOKEN = "<item>"
NO_ITEM, NO_LABEL = -1, -100
PROMPT, PADDING = -1, -2  # `part` of tokens that belong to no answer
FILL = {  # padding: any token will do, as nothing attends to it
    "input_ids": 0, "owners": NO_ITEM, "prompt": False, "position_ids": 0, "part": PADDING,
    "labels": NO_LABEL, "at": 0, "column": PADDING,
}  # fmt: skip


def wording(noun: str, verb: str) -> tuple[str, str, str]:
    """The text before the history, before the candidates and before the answer."""
    return f"Each {noun} this person {verb}, in order:", f". The next {noun} is one of:", f". The next {noun} is:"


def prompt_text(history: Sequence[str], candidates: Sequence[str], noun: str, verb: str, mark: str = ITEM_TOKEN) -> str:
    """The prompt of titles as text, with a mark after each; `Prompts` writes the same in tokens."""
    opening, offer, question = wording(noun, verb)
    read, offered = ("; ".join(f"{title}{mark}" for title in titles) for titles in (history, candidates))
    return f"{opening} {read}{offer} {offered}{question}"


def _plain(text: str) -> str:
    """Equal for texts that count as the same title."""
    return one_line(one_line(text).casefold())


class Prompts:
    """Writes the prompts of one data set for one tokenizer.

    titles: unique titles by item id; noun, verb: what the items are and what people do with them.
    Raises UserError for a tokenizer without an end token, and for titles that it cannot write and read back.
    """

    pad_to_multiple_of = 1  # tokens; padding to multiples gives `forward` fewer different shapes

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], noun: str, verb: str):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the base model's tokenizer has no end token, which has to end each answer: set its eos_token"
            )
        self.has_item_token = ITEM_TOKEN in tokenizer.get_vocab()
        if not self.has_item_token:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens([AddedToken(ITEM_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.tokenizer, self.titles, self.words = tokenizer, [one_line(title) for title in titles], (noun, verb)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        opening, offer, question = wording(noun, verb)
        self.opening = bos + tokenizer(opening, add_special_tokens=False).input_ids
        self.offer, self.question, self.separator = self._tokens([offer, question, ";"])
        self.answers = self._tokens([f" {title}" for title in self.titles])
        self.size = [len(answer) for answer in self.answers]  # tokens
        self.longest = max(self.size) + 1  # tokens of an answer, with the end
        self.end, self.item_token = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ITEM_TOKEN)
        self._refuse_unreadable_titles()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they follow other text: sentence-piece tokenizers mark a start.

        A line break comes before; unlike a sign it is not one token with the signs that follow.
        """
        before = self.tokenizer("\n", add_special_tokens=False).input_ids
        ids = self.tokenizer([f"\n{text}" for text in texts], add_special_tokens=False).input_ids
        return [tokens[len(before) :] for tokens in ids]

    def _refuse_unreadable_titles(self) -> None:
        """Each title, written as an answer, must read back as itself: see `read_answer`, with all titles offered."""
        plain = [_plain(title) for title in self.titles]
        number = Counter(plain)
        found = self.tokenizer.batch_decode(self.answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pairs = zip(self.titles, plain, found, strict=True)
        wrong = [title for title, own, text in pairs if not own or number[own] > 1 or _plain(_first_line(text)) != own]
        if wrong:
            raise UserError(
                f"{len(wrong)} of {len(self.titles)} titles do not read back as themselves when this tokenizer writes "
                f"them, such as {', '.join(map(repr, wrong[:3]))}: change these titles, or choose another base model"
            )

    def read(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def join(self, titles: Sequence[list[int]], items: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Token ids of "A; B; C" and, for each token, the item whose behaviour token it is, or NO_ITEM."""
        tokens, owners = [], []
        for place, title in enumerate(titles):
            piece = (self.separator if place else []) + title
            owners += [NO_ITEM] * len(piece)
            if items is not None:
                piece = [*piece, self.item_token]
                owners.append(items[place])
            tokens += piece
        return tokens, owners

    def write(self, history: Sequence[int], candidates: Sequence[int], behaviour: bool) -> tuple[list[int], list[int]]:
        """One prompt up to the question: token ids and the owner of each token, see `join`."""
        tokens, owners = list(self.opening), [NO_ITEM] * len(self.opening)
        for items, after in ((history, self.offer), (candidates, self.question)):
            listed, owned = self.join([self.answers[item] for item in items], items if behaviour else None)
            tokens += listed + after
            owners += owned + [NO_ITEM] * len(after)
        return tokens, owners

    def batch(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]] | None = None,
        behaviour: bool = True,
    ) -> dict[str, Tensor]:
        """Prompts, each (batch, tokens): input_ids, owners, and prompt (bool), false for answers and padding.

        histories: item ids, oldest first, without padding. Without `answers` the padding is on the left, as `generate`
        wants it. answers: for each row the items whose titles follow the prompt, padded on the right. Then there are
        also, (batch, tokens), position_ids and part: which answer a token belongs to, PROMPT, or PADDING; and, (batch,
        answer tokens), labels: the tokens of all answers, each with the end token, or NO_LABEL; at: the place of the
        token that a label follows; column: the label's answer, or PADDING.
        """
        items = np.concatenate([np.asarray(row, np.int64) for rows in (histories, candidates) for row in rows])
        if len(items) and not 0 <= items.min() <= items.max() < len(self.titles):
            raise IndexError(f"items are 0 to {len(self.titles) - 1}, not {items.min()} to {items.max()}")
        prompts = [self.write(*row, behaviour) for row in zip(histories, candidates, strict=True)]
        if answers is None:
            rows = [{"input_ids": ids, "owners": owners, "prompt": [True] * len(ids)} for ids, owners in prompts]
        else:
            rows = [self._answered(*prompt, titles) for prompt, titles in zip(prompts, answers, strict=True)]
        return {name: self._pad([row[name] for row in rows], value, answers is None)
                for name, value in FILL.items() if name in rows[0]}  # fmt: skip

    def _answered(self, prompt: list[int], owners: list[int], items: Sequence[int]) -> dict[str, list]:
        """A row of `batch`, without padding: a prompt followed by the titles of items."""
        row = {"input_ids": list(prompt), "position_ids": list(range(len(prompt))), "part": [PROMPT] * len(prompt)}
        row |= {"labels": [], "at": [], "column": []}
        for column, item in enumerate(items):
            title, start = self.answers[item], len(row["input_ids"])
            row["at"] += [len(prompt) - 1, *range(start, start + len(title))]
            row["labels"] += [*title, self.end]
            row["column"] += [column] * (len(title) + 1)
            row["input_ids"] += title
            row["position_ids"] += range(len(prompt), len(prompt) + len(title))
            row["part"] += [column] * len(title)
        added = len(row["input_ids"]) - len(prompt)
        return row | {"owners": owners + [NO_ITEM] * added, "prompt": [True] * len(prompt) + [False] * added}

    def _pad(self, rows: Sequence[list[int]], value: int | bool, left: bool) -> Tensor:
        """(rows, longest), a multiple of `pad_to_multiple_of` unless the padding is on the left."""
        multiple = 1 if left else self.pad_to_multiple_of
        width = multiple * math.ceil(max(map(len, rows)) / multiple)
        padded = np.full((len(rows), width), value)
        for place, row in zip(padded, rows, strict=True):
            place[width - len(row) if left else 0 :][: len(row)] = row
        return torch.from_numpy(padded)

    def length(self, history: Sequence[int], candidates: Sequence[int], behaviour: bool = False) -> int:
        """Tokens of a prompt up to the question."""
        tokens = len(self.opening) + len(self.offer) + len(self.question)
        for items in (history, candidates):
            tokens += sum(self.size[item] for item in items) + (len(self.separator) + behaviour) * len(items)
            tokens -= len(self.separator) * bool(len(items))
        return tokens


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def read_answer(text: str, titles: Sequence[str]) -> int | None:
    """Column of the offered title that an answer names, or None: an invalid answer.

    Valid is an answer whose first line is an offered title (case and spacing aside) or, failing that, one in
    which exactly one offered title occurs, the rule of the released code.
    """
    plain = [_plain(title) for title in titles]
    first = _plain(_first_line(text))
    if first in plain:
        return plain.index(first)
    whole = _plain(text)
    inside = [column for column, title in enumerate(plain) if title in whole]
    return inside[0] if len(inside) == 1 else None
