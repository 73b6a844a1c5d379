"""Load a data set by name: read its source once, check it, and keep it in the one form."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ilora import artifacts
from ilora.data import readers
from ilora.data.dataset import CANDIDATES, MIN_HISTORY, SPLITS, Dataset, assemble, item_table, load_dataset
from ilora.data.world import make_world
from ilora.errors import UserError

log = logging.getLogger(__name__)
REPEATS = ("keep", "drop")
WORDS = {  # noun and verb of a data set, for prompts; LLaRA lists lastfm's artists in one global order, not by time
    "world": ("story", "read"), "movielens": ("movie", "watched"), "lastfm": ("artist", "listened to"),
    "steam": ("game", "played"), "llara": ("item", "chose"), "csv": ("item", "chose"),
}  # fmt: skip


def load(
    dataset: str = "world", data_dir: str = "", conflict: float = 0.5, users: int = 2000, seed: int = 0,
    repeats: str = "keep",
) -> Dataset:  # fmt: skip
    """The data set of that name; read once, then kept in `artifacts.home()/data/<key>`.  Raises UserError.

    dataset: one of WORDS; llara is a folder of LLaRA's files, csv one with events.csv and items.csv, see `read_csv`.
    data_dir: the folder with the files or its parent; the world needs none, and without one MovieLens is downloaded.
    conflict, users, seed: of the world. repeats: "drop" leaves out events of items that the user chose before.
    """
    settings, inputs, read_source = _source(dataset, data_dir, conflict, users, seed, repeats)

    def make(folder: Path, _: Path) -> None:
        source = read_source()
        if repeats == "drop":
            repeated = source.events.duplicated(["user", "item"])
            notes = (*source.notes, f"repeats = 'drop' left out {repeated.sum()} of {len(repeated)} events")
            source = replace(source, events=source.events[~repeated].reset_index(drop=True), notes=notes)
        if (n := len(source.items)) < CANDIDATES:
            raise UserError(f"{dataset} has {n} items, but each question offers {CANDIDATES}: add items")
        usable = source.users["split"][source.events["user"][source.events.groupby("user").cumcount() == MIN_HISTORY]]
        if missing := [split for split in SPLITS if split not in set(usable)]:
            have = f"{len(source.users)} users, {len(usable)} of them with at least {MIN_HISTORY + 1} events"
            raise UserError(f"{dataset} has {have}, and none of them in its {missing[0]} split: add events")
        noun, verb = WORDS[dataset]
        about = {"name": dataset, "key": artifacts.key(settings, inputs), "noun": noun, "verb": verb}
        replace(source, notes=source.notes + _notes(source.events), **about).save(folder)

    loaded = load_dataset(artifacts.cached("data", settings, inputs, make, note=dataset))
    object.__setattr__(loaded, "as_loaded", loaded.content)  # by which a change is seen
    for note in loaded.notes:
        log.warning("%s: %s", dataset, note)
    return loaded


def source_key(*arguments: object, **settings: object) -> str:
    """The key of the data set that `load` gives for the same arguments, without reading it."""
    return artifacts.key(*_source(*arguments, **settings)[:2])


def _source(dataset="world", data_dir="", conflict=0.5, users=2000, seed=0, repeats="keep") -> tuple:
    """Settings and inputs of a data set's key, and a function that reads it."""
    if repeats not in REPEATS:
        raise UserError(f"repeats must be one of {', '.join(REPEATS)}, not {repeats!r}")
    if dataset not in WORDS:
        raise UserError(f"there is no data set {dataset!r}: choose among {', '.join(WORDS)}")
    settings = {"dataset": dataset, "repeats": repeats}
    if dataset == "world":
        generated = make_world(users, conflict, seed)
        items = item_table(generated.items["title"], generated.items["text"])
        world = assemble(items, *generated.events.to_numpy().T, range(users))
        content = hashlib.sha256(world.items.to_csv(index=False).encode() + world.events.to_numpy().tobytes())
        return settings, {"world": content.hexdigest()}, lambda: world
    reader, files = readers.find_source(dataset, data_dir)
    settings["reader"] = f"_{reader.__name__}"  # as in the keys of stored results
    return settings, {file.name: artifacts.content(file) for file in files}, lambda: reader(files)


def _notes(events: pd.DataFrame) -> tuple[str, ...]:
    """One sentence on equal times and one on repeats, with their number, where they occur."""
    position = events.groupby("user").cumcount()
    back = position - position.groupby([events["user"], events["item"]]).shift()  # events since the item was chosen
    is_target = position >= MIN_HISTORY
    repeated, ties = is_target & (back <= 10), events.duplicated(["user", "time"], keep=False)
    counts = {
        f"of {len(events)} events have the time of another one of their user, which leaves their order open": ties,
        f"of {is_target.sum()} targets ({repeated.sum() / is_target.sum():.1%}) are among the 10 items before, "
        "but no other candidate is, so the prompt gives the answer away (repeats='drop' prevents this)": repeated,
    }
    return tuple(f"{rows.sum()} {what}" for what, rows in counts.items() if rows.any())
