"""Windows of users' histories, the candidates offered after each window, and the questions made of both."""

from copy import copy
from dataclasses import dataclass, fields

import numpy as np

from ilora.data.dataset import CANDIDATES, MIN_HISTORY, SPLITS, Dataset
from ilora.errors import UserError

Row = tuple[np.ndarray, np.ndarray, int]  # of Questions: history, padded on the left with n_items; candidates; target
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sequences:
    """Windows of users' histories, one per row."""

    user: np.ndarray  # (n,) as in Dataset.users
    position: np.ndarray  # (n,) index of the target among the user's events
    history: np.ndarray  # (n, window) item ids, oldest first, padded on the left
    length: np.ndarray  # (n,) items in the history, at most window
    target: np.ndarray  # (n,) the item that came next

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray | list[int] | slice) -> "Sequences":
        """The rows selected by an index array, a mask or a slice."""
        return Sequences(*(getattr(self, field.name)[index] for field in fields(self)))


def sequences(
    dataset: Dataset, split: str, window: int = 10, windows: str = "all", min_history: int = MIN_HISTORY
) -> Sequences:
    """The split's events with `min_history` before them; windows="last": each user's last only, as in LLaRA's rows."""
    if split not in SPLITS or windows not in ("all", "last"):
        raise UserError(f"choose split among {SPLITS} and windows 'all' or 'last', not {split!r}, {windows!r}")
    user, item = dataset.events["user"].to_numpy(), dataset.events["item"].to_numpy()  # sorted by user and time
    position = dataset.events.groupby("user").cumcount().to_numpy()
    is_target = (dataset.users["split"] == split).to_numpy()[user] & (position >= min_history)
    if windows == "last":
        is_target &= np.diff(user, append=-1) != 0
    row, padded = np.flatnonzero(is_target), np.concatenate([np.full(window, len(dataset.items)), item])
    history = np.lib.stride_tricks.sliding_window_view(padded, window)[row]  # may start in other users' events
    history[np.arange(window, 0, -1) > position[row, None]] = len(dataset.items)
    return Sequences(user[row], position[row], history, np.minimum(position[row], window), item[row])


def splitmix64(state: np.ndarray) -> np.ndarray:
    """Hash uint64 one to one (Steele, Lea and Flood 2014)."""
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def candidates(sequences: Sequences, n_items: int, seed: int) -> np.ndarray:
    """(n, CANDIDATES) the target and random items outside the history; only seed, history and target decide."""
    longest = int(sequences.length.max(initial=0))
    if n_items < (need := CANDIDATES + longest):
        problem = f"{CANDIDATES} candidates outside a history of {longest} items need {need} items, there are {n_items}"
        raise UserError(f"{problem}: add items or choose a window of at most {max(n_items - CANDIDATES, 0)}")
    history, target = sequences.history, sequences.target
    state = splitmix64(np.full(len(target), seed, dtype=np.uint64))
    for column in history.T:  # padding does not change the state, so the width of the window does not matter
        state = np.where(column < n_items, splitmix64(state ^ column.astype(np.uint64)), state)
    state = splitmix64(state ^ target.astype(np.uint64))
    first, row = history.shape[1] + 1, np.arange(len(target))
    taken = np.vstack([history.T, target, np.zeros((CANDIDATES - 1, len(target)), int)]).astype(np.int32)
    draws = np.zeros(len(target), dtype=np.uint64)  # numbers that each row has drawn so far
    for column in range(first, len(taken)):
        pending = slice(None)  # all rows, then those that drew an item for the second time
        while len(row[pending]):
            draws[pending] += np.uint64(1)
            taken[column, pending] = splitmix64(state[pending] + draws[pending] * _GOLDEN) % np.uint64(n_items)
            pending = row[pending][(taken[:column, pending] == taken[column, pending]).any(axis=0)]
    offered = np.column_stack([*taken[first:], target])
    place = (splitmix64(state) % np.uint64(CANDIDATES)).astype(np.int64)
    offered[:, -1], offered[row, place] = offered[row, place], target
    return offered.astype(np.int64)


class Questions:
    """Sequences with candidates: a sequence of `Row`."""

    def __init__(self, sequences: Sequences, n_items: int, seed: int):
        self.sequences, self.n_items, self.seed = sequences, n_items, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw new candidates for an epoch of training; epoch 0 has those of `seed` itself."""
        self.candidates = candidates(self.sequences, self.n_items, self.seed + 1_000_003 * epoch)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> Row:
        return self.sequences.history[row], self.candidates[row], int(self.sequences.target[row])

    def take(self, index: np.ndarray) -> "Questions":
        """The rows selected by an index array, a mask or a slice, with their present candidates."""
        part = copy(self)
        part.sequences, part.candidates = self.sequences.take(index), self.candidates[index]
        return part


def questions(
    dataset: Dataset, split: str, window: int = 10, limit: int = 0, windows: str = "all", seed: int = 0
) -> Questions:
    """The split's sequences with candidates; `limit` keeps a random part, the same for the same seed."""
    rows = sequences(dataset, split, window, windows)
    if 0 < limit < len(rows):
        rows = rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False)))
    return Questions(rows, len(dataset.items), seed)
