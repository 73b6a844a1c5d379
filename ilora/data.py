"""The one form of data: items, histories in time order, users in three splits; sequences and candidates of it.

`load` reads any source (see `sources`), checks it and keeps it as CSV and JSON files that a person can open.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ilora import runs, sources
from ilora.runs import UserError
from ilora.tables import SPLITS, Tables

log = logging.getLogger(__name__)

MIN_HISTORY = 3  # LLaRA drops windows with fewer items before the target
CANDIDATES = 20  # the target and 19 others
REPEATS = ("keep", "drop")

WORDS = {  # noun and verb of a data set, for prompts
    "world": ("story", "read"),
    "movielens": ("movie", "watched"),
    "lastfm": ("artist", "listened to"),
    "steam": ("game", "played"),
    "llara": ("item", "chose"),
    "csv": ("item", "chose"),
}


@dataclass(frozen=True)
class Dataset:
    """One data set in the form that everything else uses."""

    items: pd.DataFrame  # id (0..n-1, in order), title (unique), text (may be ""), source_id (the source's name)
    events: pd.DataFrame  # user, item, time (int64, the source's unit); by user, then time, then order in the source
    users: pd.DataFrame  # user (0..n-1), split, source_id
    name: str = ""
    key: str = ""  # of parameters and the sources' checksums; names the folder of the stored copy
    noun: str = "item"
    verb: str = "chose"
    notes: tuple[str, ...] = ()  # what a reader of results must know about this copy

    @property
    def padding(self) -> int:
        """The id that fills histories up: one past the last item."""
        return len(self.items)

    def save(self, folder: str | Path) -> None:
        """Write items.csv, events.csv, users.csv and dataset.json to `folder`: all of them or none."""
        with runs.atomic_folder(folder) as temporary:
            self._write(temporary)

    def _write(self, folder: Path) -> None:
        tables = {"items": self.items, "events": self.events, "users": self.users}
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        about = {field: getattr(self, field) for field in ("name", "key", "noun", "verb", "notes")}
        about["counts"] = {name: len(table) for name, table in tables.items()}
        about["users_in_split"] = self.users["split"].value_counts().to_dict()
        runs.write_json(folder / "dataset.json", about)


def load_dataset(folder: str | Path) -> Dataset:
    """Read what `Dataset.save` wrote."""
    folder = Path(folder)
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    about = {field: about[field] for field in ("name", "key", "noun", "verb", "notes")}
    text = dict.fromkeys(("title", "text", "source_id", "split"), str)
    tables = [
        pd.read_csv(folder / f"{name}.csv", dtype=text, keep_default_na=False) for name in ("items", "events", "users")
    ]
    return Dataset(*tables, **about | {"notes": tuple(about["notes"])})


def load(
    dataset: str = "world", data_dir: str = "", conflict: float = 0.5, users: int = 2000, seed: int = 0,
    repeats: str = "keep",
) -> Dataset:  # fmt: skip
    """The data set of that name; read once, then kept in `runs.home()/data/<key>`.

    dataset: world, movielens, lastfm, steam, llara (a folder of LLaRA's files) or csv (a folder with
        events.csv: user, item, time, and items.csv: id, title, and text if there is any).
    data_dir: the folder with the files or one above it (ml-100k, llara/lastfm, ... are looked for). Empty:
        the world is drawn; MovieLens and LastFM are downloaded, licence shown first, checksum compared.
    conflict, users, seed: of the world.
    repeats: "keep" all events, or "drop" each event of an item that the user chose before, so that no target is in
        its history. What `keep` leaves in is counted in the notes.
    Raises UserError: one sentence with file, line or row, and remedy.
    """
    settings, files, read = _source(dataset, data_dir, conflict, users, seed, repeats)
    noun, verb = WORDS[dataset]

    def make(folder: Path) -> None:
        items, events, split, notes = read()
        if repeats == "drop":
            again = events.duplicated(["user", "item"])
            notes += (f"repeats = 'drop' left out {again.sum()} of {len(events)} events",)
            events = events[~again].reset_index(drop=True)
        notes += _notes(events)
        made = Dataset(items, events, split, dataset, runs.key(settings, files), noun, verb, notes)
        _check_usable(made)
        made._write(folder)

    kept = load_dataset(runs.cached("data", settings, files, make, note=dataset))
    for note in kept.notes:
        log.warning("%s: %s", dataset, note)
    return kept


def source_key(
    dataset: str = "world", data_dir: str = "", conflict: float = 0.5, users: int = 2000, seed: int = 0,
    repeats: str = "keep",
) -> str:  # fmt: skip
    """The key of the data set that `load` gives, from the content of its files, without reading it."""
    return runs.key(*_source(dataset, data_dir, conflict, users, seed, repeats)[:2])


def _source(
    dataset: str, data_dir: str, conflict: float, users: int, seed: int, repeats: str
) -> tuple[dict, dict[str, str], Callable[[], Tables]]:
    """Settings and inputs of a data set's key, and its reader."""
    if repeats not in REPEATS:
        raise UserError(f"repeats must be one of {', '.join(REPEATS)}, not {repeats!r}")
    if dataset not in WORDS:
        raise UserError(f"there is no data set {dataset!r}: choose among {', '.join(WORDS)}")
    settings = {"dataset": dataset, "repeats": repeats}
    if dataset == "world":
        world = sources.read_world(conflict, users, seed)
        return settings, {"world": _content(world)}, lambda: world
    read, files = sources.find_source(dataset, data_dir)
    inputs = {file.name: runs.content(file) for file in files}
    return settings | {"reader": read.__name__}, inputs, lambda: read(files)


def _notes(events: pd.DataFrame) -> tuple[str, ...]:
    """The numbers of repeats and of equal times, a sentence each; none where there are none."""
    user, n = events["user"], len(events)
    position = events.groupby("user").cumcount()
    back = position - position.groupby([user, events["item"]]).shift()  # events since the user last chose the item
    targets, repeated = position >= MIN_HISTORY, (position >= MIN_HISTORY) & (back <= 10)
    twins = events.duplicated(["user", "item", "time"])
    ties = events[~twins].duplicated(["user", "time"], keep=False)
    counts = {
        f"of {n} events repeat another one, with the same user, item and time": twins,
        f"of {n} events have the time of another one of their user, which leaves their order open": ties,
        f"of {targets.sum()} targets ({repeated.sum() / max(targets.sum(), 1):.1%}) are among the 10 items before, "
        "where no other candidate can be, so the prompt gives the answer away (repeats='drop' prevents this)": repeated,
    }
    return tuple(f"{rows.sum()} {what}" for what, rows in counts.items() if rows.any())


def _content(tables: Tables) -> str:
    digest = hashlib.sha256(tables.items.to_csv(index=False).encode())
    digest.update(tables.events.to_numpy().tobytes())
    return digest.hexdigest()


def _check_usable(dataset: Dataset) -> None:
    if len(dataset.items) < CANDIDATES:
        raise UserError(
            f"{dataset.name} has {len(dataset.items)} items, but each question offers {CANDIDATES}: add items"
        )
    counts = np.bincount(dataset.events["user"], minlength=len(dataset.users))
    usable = dataset.users["split"][counts > MIN_HISTORY].value_counts()
    for split in SPLITS:
        if split not in usable:
            raise UserError(
                f"{dataset.name} has {len(dataset.users)} users, {usable.sum()} of them with at least "
                f"{MIN_HISTORY + 1} events ({MIN_HISTORY} of history and a target), and none of these in its "
                f"{split} split: add users with more events"
            )


# ---------------------------------------------------------------- sequences and candidates


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
