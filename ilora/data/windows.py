"""Windows of users' histories, the candidates that are offered for each, and both as questions."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields

import numpy as np

from ilora.data.dataset import CANDIDATES, MIN_HISTORY, Dataset
from ilora.data.tables import SPLITS
from ilora.errors import UserError


@dataclass(frozen=True)
class Sequences:
    """Windows of users' histories, one a row."""

    user: np.ndarray  # (n,) as in Dataset.users
    position: np.ndarray  # (n,) index of the target among the user's events
    history: np.ndarray  # (n, window) item ids, oldest first, filled up on the left with the padding id
    length: np.ndarray  # (n,) items in the history, at most window
    target: np.ndarray  # (n,) the item that came next

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray | Sequence[int] | slice) -> "Sequences":
        """The rows of an index array, a mask or a slice."""
        return Sequences(*(getattr(self, field.name)[index] for field in fields(self)))


def sequences(
    dataset: Dataset, split: str, window: int = 10, windows: str = "all", min_history: int = MIN_HISTORY
) -> Sequences:
    """Each event of the split's users that has at least `min_history` events before it, as a target.

    windows: "all", or "last" for each user's last event alone, as in LLaRA's validation and test rows.
    """
    if split not in SPLITS or windows not in ("all", "last"):
        raise UserError(f"choose split among {SPLITS} and windows 'all' or 'last', not {split!r}, {windows!r}")
    user, item = dataset.events["user"].to_numpy(), dataset.events["item"].to_numpy()
    count = np.bincount(user, minlength=len(dataset.users))  # events lie by user
    first = np.cumsum(count) - count
    chosen = (dataset.users["split"] == split).to_numpy()
    if windows == "last":
        row = (first + count - 1)[chosen & (count > min_history)]
    else:
        row = np.flatnonzero(np.repeat(chosen, count) & (np.arange(len(user)) - np.repeat(first, count) >= min_history))
    position = row - first[user[row]]
    before = np.concatenate([np.full(window, dataset.padding), item])
    history = np.lib.stride_tricks.sliding_window_view(before, window)[row]  # the rows before, whosoever they are
    for back in range(1, window + 1):  # a column at a time: no (n, window) mask
        np.copyto(history[:, -back], dataset.padding, where=position < back)
    return Sequences(user[row], position, history, np.minimum(position, window), item[row])


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): hashes uint64 one to one."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def candidates(sequences: Sequences, n_items: int, seed: int, size: int = CANDIDATES) -> np.ndarray:
    """(n, size) item ids: the target in a random column, the others random, distinct and not in the history.

    Row i follows from seed, history i and target i alone: the same in any order, batch and process.
    Raises UserError if there are too few items to choose from.
    """
    longest = int(sequences.length.max(initial=0))
    if n_items < size + longest:
        raise UserError(
            f"{size} candidates outside a history of {longest} items need {size + longest} items, there are "
            f"{n_items}: add items or choose a window of at most {max(n_items - size, 0)}"
        )
    chosen = np.empty((len(sequences), size), dtype=np.int64)
    chunk = 8192  # rows whose work stays near a processor's cache
    for at in range(0, len(sequences), chunk):
        part = slice(at, at + chunk)
        chosen[part] = _choose(sequences.take(part), n_items, seed, size)
    return chosen


def _choose(sequences: Sequences, n_items: int, seed: int, size: int) -> np.ndarray:
    history, target, rows = sequences.history, sequences.target, np.arange(len(sequences))
    state = _mix(np.full(len(target), seed, dtype=np.uint64))
    for column in history.T:  # padding leaves no trace, so the window's width does not matter
        state = np.where(column < n_items, _mix(state ^ column.astype(np.uint64)), state)
    state = _mix(state ^ target.astype(np.uint64))
    taken = np.concatenate([target[None], history.T, np.empty((size - 1, len(target)), dtype=np.int64)], dtype=np.int32)
    draws = np.zeros(len(target), dtype=np.uint64)

    def draw(column: int, rows: np.ndarray | slice) -> np.ndarray:
        """Put the next random item into a column of `taken`; whether an earlier column has it."""
        draws[rows] += np.uint64(1)
        taken[column, rows] = _mix(state[rows] + draws[rows] * _GOLDEN) % np.uint64(n_items)
        return (taken[:column, rows] == taken[column, rows]).any(axis=0)

    for column in range(len(taken) - size + 1, len(taken)):
        pending = np.flatnonzero(draw(column, slice(None)))
        while len(pending):  # draw again where the item is taken
            pending = pending[draw(column, pending)]
    chosen = np.column_stack([*taken[1 - size :], target])
    place = (_mix(state) % np.uint64(size)).astype(np.int64)
    chosen[:, -1], chosen[rows, place] = chosen[rows, place], target
    return chosen


Row = tuple[np.ndarray, np.ndarray, int]  # of Questions


class Questions:
    """Sequences with candidates; row i is (history without padding, candidates, target).

    `set_epoch` draws other candidates for each epoch of training; epoch 0 has those of `seed` itself.
    """

    def __init__(self, sequences: Sequences, n_items: int, seed: int):
        self.sequences, self.n_items, self.seed = sequences, n_items, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.candidates = candidates(self.sequences, self.n_items, self.seed + 1_000_003 * epoch)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> Row:
        length = self.sequences.length[row]
        history = self.sequences.history[row, self.sequences.history.shape[1] - length :]
        return history, self.candidates[row], int(self.sequences.target[row])

    def take(self, index: np.ndarray) -> "Questions":
        """The rows of an index array, a mask or a slice, with the candidates that they have now."""
        part = copy(self)
        part.sequences, part.candidates = self.sequences.take(index), self.candidates[index]
        return part


def questions(
    dataset: Dataset, split: str, window: int = 10, limit: int = 0, windows: str = "all", seed: int = 0
) -> Questions:
    """The split's sequences with 20 candidates each; `limit` keeps a random part, the same for the same seed."""
    asked = sequences(dataset, split, window, windows)
    if 0 < limit < len(asked):
        chosen = np.random.default_rng(seed).choice(len(asked), limit, replace=False)
        asked = asked.take(np.sort(chosen))
    return Questions(asked, len(dataset.items), seed)
