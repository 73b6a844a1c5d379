"""The one form of every data set: items, histories in time order and users in three splits, kept as CSV and JSON.

A prediction is matched to an item by its title, so titles are one line in Unicode NFC, as a tokenizer writes them, and
unique, ignoring case: years and numbers are added in published data; in a user's CSV equal titles are refused.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ilora import artifacts
from ilora.errors import UserError

SPLITS = ("train", "validation", "test")
MIN_HISTORY = 3  # LLaRA drops windows with fewer items before the target
CANDIDATES = 20  # the target and 19 others


@dataclass(frozen=True)
class Dataset:
    """One data set in the form that everything else uses."""

    items: pd.DataFrame  # id (0..n-1, in order), title (unique), text (may be ""), source_id (the source's name)
    events: pd.DataFrame  # user, item, time (int64, in the source's unit); by user, time, then order in the source
    users: pd.DataFrame  # user (0..n-1), split, source_id
    name: str = ""
    key: str = ""  # of the settings and the files' content; names the folder of the stored copy
    noun: str = "item"
    verb: str = "chose"
    notes: tuple[str, ...] = ()  # what a reader of the results must know about this copy

    @property
    def content(self) -> str:
        """The input of keys: `key` while all is as `load` gave it; after a change, a digest of its rows, in order."""
        sums = (int(pd.util.hash_pandas_object(each).cumsum().sum()) for each in (self.items, self.events, self.users))
        now = artifacts.digest([self.key, self.noun, self.verb, *sums])
        return self.key if vars(self).get("as_loaded") == now else now

    def save(self, folder: str | Path) -> None:
        """Write items.csv, events.csv, users.csv and dataset.json to `folder`: all of them or none."""
        with artifacts.atomic_folder(folder, "dataset.json") as temporary:
            about = {each.name: getattr(self, each.name) for each in fields(self)}
            for name in ("items", "events", "users"):
                about.pop(name).to_csv(temporary / f"{name}.csv", index=False)
            artifacts.write_json(temporary / "dataset.json", about)


def load_dataset(folder: str | Path) -> Dataset:
    """Read what `Dataset.save` wrote."""
    about = json.loads(Path(folder, "dataset.json").read_text(encoding="utf-8"))
    text = dict.fromkeys(("title", "text", "source_id", "split"), str)
    for name in ("items", "events", "users"):
        about[name] = pd.read_csv(Path(folder, f"{name}.csv"), dtype=text, keep_default_na=False)
    return Dataset(**about | {"notes": tuple(about["notes"])})


def item_table(titles: Sequence[str], text: Sequence[str] = (), source_id: Sequence = ()) -> pd.DataFrame:
    """Items in the given order; `source_id` is each item's id in the source, by default its number."""
    title, text = [one_line(each) for each in titles], [one_line(each) for each in text] or ""
    source_id = [str(each) for each in (source_id if len(source_id) else range(len(title)))]
    return pd.DataFrame({"id": range(len(title)), "title": title, "text": text, "source_id": source_id})


def user_table(split: Sequence[str], source_id: Sequence) -> pd.DataFrame:
    """Users in the given order, with their splits and their ids in the source."""
    table = {"user": range(len(split)), "split": split, "source_id": source_id}
    return pd.DataFrame(table).astype({"split": str, "source_id": str})


def assemble(items: pd.DataFrame, user: np.ndarray, item: np.ndarray, time: np.ndarray, source_id: Sequence) -> Dataset:
    """Sort events; split users by first event, 80:10:10 as in LLaRA.  user, item: rows of source_id and items."""
    events = pd.DataFrame({"user": user, "item": item, "time": time}, dtype=np.int64)
    events = events.iloc[np.lexsort((time, user))].reset_index(drop=True)  # equal times keep the order of the source
    rank = events.groupby("user")["time"].min().rank(method="first").to_numpy() - 1
    split = np.array(SPLITS)[np.digitize(rank, (int(0.8 * len(source_id)), int(0.9 * len(source_id))))]
    return Dataset(items, events, user_table(split, source_id))


def one_line(text: str) -> str:
    """The text in one line: Unicode NFC, single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def title_key(title: str) -> str:
    """Equal for titles that count as the same."""
    return one_line(one_line(title).casefold())


def unique_titles(titles: Sequence[str], years: Sequence[str] | str = "") -> list[str]:
    """Add the year to a title with several years, then (2), (3), ... to repeated titles."""
    table = pd.DataFrame({"title": [one_line(title) for title in titles], "year": years}, dtype=str)
    differ = table.groupby(table["title"].map(title_key))["year"].transform("nunique") > 1
    title = table["title"].mask(differ & (table["year"] != ""), table["title"] + " (" + table["year"] + ")")
    while (number := title.groupby(title.map(title_key)).cumcount() + 1).max() > 1:  # "A (2)" may be a title already
        title = title.mask(number > 1, title + " (" + number.astype(str) + ")")
    return list(title)


def refuse_rows(file: Path, wrong: pd.Series, message: str, *values: pd.Series, word: str = "line") -> None:
    """Raise UserError for the first row where `wrong`, its `values` in the message; the indices are line numbers."""
    lines = wrong.index[wrong]
    if len(lines):
        count = f" ({len(lines)} such {word}s)" if len(lines) > 1 else ""
        text = message.format(*(value[lines[0]] for value in values))
        raise UserError(f"{file}, {word} {lines[0]}: {text}{count}")
