"""The one form of data: items, histories in time order, users in three splits; sequences and candidates of it.

`load` reads any source (see `sources`), checks it and keeps it as CSV and JSON files that a person can open.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ilora import artifacts
from ilora.data import readers
from ilora.data.tables import SPLITS, Tables
from ilora.errors import UserError

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
        with artifacts.atomic_folder(folder) as temporary:
            self._write(temporary)

    def _write(self, folder: Path) -> None:
        tables = {"items": self.items, "events": self.events, "users": self.users}
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        about = {field: getattr(self, field) for field in ("name", "key", "noun", "verb", "notes")}
        about["counts"] = {name: len(table) for name, table in tables.items()}
        about["users_in_split"] = self.users["split"].value_counts().to_dict()
        artifacts.write_json(folder / "dataset.json", about)


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
    """The data set of that name; read once, then kept in `artifacts.home()/data/<key>`.

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
        made = Dataset(items, events, split, dataset, artifacts.key(settings, files), noun, verb, notes)
        _check_usable(made)
        made._write(folder)

    kept = load_dataset(artifacts.cached("data", settings, files, make, note=dataset))
    for note in kept.notes:
        log.warning("%s: %s", dataset, note)
    return kept


def source_key(
    dataset: str = "world", data_dir: str = "", conflict: float = 0.5, users: int = 2000, seed: int = 0,
    repeats: str = "keep",
) -> str:  # fmt: skip
    """The key of the data set that `load` gives, from the content of its files, without reading it."""
    return artifacts.key(*_source(dataset, data_dir, conflict, users, seed, repeats)[:2])


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
        world = readers.read_world(conflict, users, seed)
        return settings, {"world": _content(world)}, lambda: world
    read, files = readers.find_source(dataset, data_dir)
    inputs = {file.name: artifacts.content(file) for file in files}
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
