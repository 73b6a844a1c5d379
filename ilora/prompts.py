"""Prompts: a history, twenty candidates and a question, put together from titles that were tokenised once.

    Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is: Y</s>

A behaviour token after each title (`A<item>; B<item>`) makes the prompt hybrid: the model replaces the token's
embedding by the projected embedding of the recommender (Eq. 6). Left as it is, it is LLaRA's placeholder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ITEM_TOKEN = "<item>"
NO_ITEM, NO_LABEL = -1, -100


def wording(noun: str, verb: str) -> tuple[str, str, str]:
    """What stands before the history, before the candidates and before the answer."""
    return f"Each {noun} this person {verb}, in order:", f". The next {noun} is one of:", f". The next {noun} is:"


class Prompts:
    """Writes the prompts of one data set for one tokenizer.

    titles: unique titles by item id; noun, verb: what the items are and what people do with them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], noun: str, verb: str):
        self.tokenizer, self.titles, self.words = tokenizer, list(titles), (noun, verb)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        opening, offer, question = wording(noun, verb)
        self.opening = bos + tokenizer(opening, add_special_tokens=False).input_ids
        self.offer, self.question = self._tokens(offer), self._tokens(question)
        self.separator = self._tokens(";")
        self.answers = [self._tokens(f" {title}") for title in self.titles]
        self.end = tokenizer.eos_token_id
        unknown = tokenizer.unk_token_id
        known = tokenizer.convert_tokens_to_ids(ITEM_TOKEN)
        # A tokenizer without the token lends another special one; its place, not its id, says what it is.
        self.item_token = known if known not in (None, unknown) else unknown if unknown is not None else self.end

    def _tokens(self, text: str) -> list[int]:
        """Token ids of a text as it stands behind other text: sentence-piece tokenizers mark a start.

        A line break is what stands before; unlike a sign it is not one token with the signs that follow.
        """
        before = self.tokenizer("\n", add_special_tokens=False).input_ids
        return self.tokenizer("\n" + text, add_special_tokens=False).input_ids[len(before) :]

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
        for items, closing in ((history, self.offer), (candidates, self.question)):
            listed, theirs = self.join([self.answers[item] for item in items], items if behaviour else None)
            tokens += listed + closing
            owners += theirs + [NO_ITEM] * len(closing)
        return tokens, owners

    def batch(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        targets: Sequence[int] | None = None,
        behaviour: bool = True,
    ) -> dict[str, Tensor]:
        """Prompts padded on the left, each (batch, tokens): input_ids, attention_mask, owners.

        histories: item ids, oldest first, without padding. With `targets` the answers and `labels` are added:
        the answer's tokens and the end token at their places, NO_LABEL elsewhere.
        """
        written = [self.write(*row, behaviour) for row in zip(histories, candidates, strict=True)]
        columns = {"input_ids": [tokens for tokens, _ in written], "owners": [owners for _, owners in written]}
        if targets is not None:
            answers = [[*self.answers[target], self.end] for target in targets]
            columns["labels"] = [[NO_LABEL] * len(tokens) for tokens in columns["input_ids"]]
            columns["input_ids"] = [a + b for a, b in zip(columns["input_ids"], answers, strict=True)]
            columns["labels"] = [a + b for a, b in zip(columns["labels"], answers, strict=True)]
            columns["owners"] = [a + [NO_ITEM] * len(b) for a, b in zip(columns["owners"], answers, strict=True)]
        return pad_left(columns, self.tokenizer.pad_token_id or 0)

    def length(self, history: Sequence[int], candidates: Sequence[int]) -> int:
        """Tokens of the titles in a prompt: what makes one prompt longer than another."""
        return sum(len(self.answers[item]) for item in (*history, *candidates))


def pad_left(columns: dict[str, list[list[int]]], pad_token: int) -> dict[str, Tensor]:
    """Rows of unequal length as tensors (batch, longest), with the attention mask; padding stands on the left."""
    fill = {"input_ids": pad_token, "owners": NO_ITEM, "labels": NO_LABEL}
    longest = max(len(row) for row in columns["input_ids"])
    padded = {
        name: torch.tensor([[fill[name]] * (longest - len(row)) + row for row in rows])
        for name, rows in columns.items()
    }
    lengths = torch.tensor([len(row) for row in columns["input_ids"]])
    padded["attention_mask"] = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
    return padded


def read_answer(text: str, titles: Sequence[str]) -> int | None:
    """Column of the offered title that an answer names, or None: an invalid answer.

    Valid is an answer whose first line is an offered title (case and spacing aside) or, failing that, one in
    which exactly one offered title occurs, the rule of the released code.
    """
    plain = [" ".join(title.split()).casefold() for title in titles]
    lines = text.strip().splitlines() or [""]
    first = " ".join(lines[0].split()).casefold()
    if first in plain:
        return plain.index(first)
    whole = " ".join(text.split()).casefold()
    inside = [column for column, title in enumerate(plain) if title in whole]
    return inside[0] if len(inside) == 1 else None
