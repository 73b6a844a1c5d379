"""Prompts: a history, twenty candidates and a question, put together from titles that were tokenised once.

    Each story this person read, in order: A; B; C. The next story is one of: X; Y; Z. The next story is: Y</s>

A behaviour token after each title (`A<item>; B<item>`) makes the prompt hybrid: the model replaces the token's
embedding by the projected embedding of the recommender (Eq. 6). Left as it is, it is LLaRA's placeholder.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ITEM_TOKEN = "<item>"
NO_ITEM, NO_LABEL = -1, -100


def wording(noun: str, verb: str) -> tuple[str, str, str]:
    """What stands before the history, before the candidates and before the answer."""
    return f"Each {noun} this person {verb}, in order:", f". The next {noun} is one of:", f". The next {noun} is:"


def prompt_text(history: Sequence[str], candidates: Sequence[str], noun: str, verb: str, mark: str = ITEM_TOKEN) -> str:
    """The prompt of titles as text, with a mark after each; `Prompts` writes the same in tokens."""
    opening, offer, question = wording(noun, verb)
    read, offered = ("; ".join(f"{title}{mark}" for title in titles) for titles in (history, candidates))
    return f"{opening} {read}{offer} {offered}{question}"


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
        self._lay_out()

    def _lay_out(self) -> None:
        """Put the pieces of all prompts one behind the other into `pieces`, so that a batch is one gather.

        Piece i < items is "; title<item>" of item i; then come opening, offer, question and, by item, "title</s>".
        """
        parts = [[*self.separator, *title, self.item_token] for title in self.answers]
        parts += [self.opening, self.offer, self.question, *([*title, self.end] for title in self.answers)]
        self.size = np.array([len(part) for part in parts])
        self.start = np.cumsum(self.size) - self.size
        self.pieces = np.concatenate([np.array(part, np.int64) for part in parts])

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
        batch = self.batch([history], [candidates], behaviour=behaviour)
        return batch["input_ids"][0].tolist(), batch["owners"][0].tolist()

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
        piece, listed, first = self._order(histories, candidates, targets)  # (pieces of the batch,)
        start, size = self.start[piece], self.size[piece]
        start[first] += len(self.separator)
        size[first] -= len(self.separator)
        size[listed] -= not behaviour
        end = np.cumsum(size)
        tokens = self.pieces[np.repeat(start - end + size, size) + np.arange(end[-1])]
        owners = np.full_like(tokens, NO_ITEM)
        if behaviour:
            owners[end[listed] - 1] = piece[listed]
        length = np.add.reduceat(size, np.flatnonzero(piece == len(self.titles)))  # a row begins with the opening
        real = np.arange(length.max()) >= (length.max() - length)[:, None]
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "owners": NO_ITEM}
        batch = {name: np.full(real.shape, value) for name, value in padding.items()}
        batch["input_ids"][real], batch["owners"][real] = tokens, owners
        batch["attention_mask"] = real.astype(np.int64)
        if targets is not None:
            answer = size[piece > len(self.titles) + 2]
            learned = np.arange(length.max()) >= (length.max() - answer)[:, None]
            batch["labels"] = np.where(learned, batch["input_ids"], NO_LABEL)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _order(
        self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]], targets: Sequence[int] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of a batch, row behind row; which of them are listed items (bool); places of each list's first."""
        lists = [items for row in zip(histories, candidates, strict=True) for items in row]
        read, offered = np.array([len(items) for items in lists]).reshape(-1, 2).T
        items = np.concatenate(lists, dtype=np.int64, casting="unsafe")  # an empty list counts as one of floats
        if len(items) and not 0 <= items.min() <= items.max() < len(self.titles):
            raise IndexError(f"items are 0 to {len(self.titles) - 1}, not {items.min()} to {items.max()}")
        number = read + offered + 3 + (targets is not None)
        opening = np.cumsum(number) - number
        piece, listed = np.empty(number.sum(), np.int64), np.ones(number.sum(), bool)
        special = [opening, opening + 1 + read, opening + 2 + read + offered]
        for place, which in zip(special, range(len(self.titles), len(self.titles) + 3), strict=True):
            piece[place], listed[place] = which, False
        if targets is not None:
            piece[opening + number - 1] = len(self.titles) + 3 + np.asarray(targets)
            listed[opening + number - 1] = False
        piece[listed] = items
        first = np.concatenate([(special[0] + 1)[read > 0], (special[1] + 1)[offered > 0]])
        return piece, listed, first

    def titles_behind(self, candidates: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The titles of candidates (batch, C), one behind the other, padded on the right; each (batch, tokens):

        input_ids; following: the token that comes next in the title, or the end; column: whose title it is, C for
        padding; place: its place in that title, from 0. And first, (batch, C): each title's first token.
        """
        answer = np.stack(candidates) + len(self.titles) + 3
        start, size = self.start[answer], self.size[answer] - 1  # (batch, C), without the end
        total, each = size.sum(1), size.ravel()
        real = np.arange(total.max()) < total[:, None]
        place = np.arange(total.sum()) - np.repeat(np.cumsum(each) - each, each)
        at = np.repeat(start.ravel(), each) + place
        behind = {"input_ids": self.pieces[at], "following": self.pieces[at + 1], "place": place}
        behind["column"] = np.repeat(np.arange(answer.size) % answer.shape[1], each)
        padded = {name: np.full(real.shape, answer.shape[1] if name == "column" else 0) for name in behind}
        for name, value in behind.items():
            padded[name][real] = value
        return {name: torch.from_numpy(value) for name, value in (padded | {"first": self.pieces[start]}).items()}

    def length(self, history: Sequence[int], candidates: Sequence[int]) -> int:
        """Tokens of the titles in a prompt: what makes one prompt longer than another."""
        return sum(len(self.answers[item]) for item in (*history, *candidates))


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
