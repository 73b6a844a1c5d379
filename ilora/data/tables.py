"""The tables that every source is made into: items, events and users, sorted, split and with unique titles.

Decisions that hold for every source:

- Titles and texts are one line in Unicode NFC with single spaces, so that what a tokenizer writes reads back as itself.
- An answer is matched to an item by its title, so titles are unique; case does not count. Published data keep all
  items: where films of several years share a title each gets its year, and what is still alike gets " (2)",
  " (3)". CSV files of a user are refused instead, naming the lines that clash.
- Splits are by user: by first event, the first 80 % train, the next 10 % validation, the rest test, as
  in LLaRA (754, 94 and 95 users of MovieLens-100K). LLaRA's own files bring their own split.
"""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ilora.errors import UserError

SPLITS = ("train", "validation", "test")


class Tables(NamedTuple):
    """What a reader makes of its source; `data.Dataset` says what the columns hold."""

    items: pd.DataFrame  # id, title, text, source_id
    events: pd.DataFrame  # user, item, time
    users: pd.DataFrame  # user, split, source_id
    notes: tuple[str, ...] = ()  # what a reader of results must know about this copy


def item_table(
    titles: Sequence[str], text: Sequence[str] | str = "", source_id: Sequence | None = None
) -> pd.DataFrame:
    """Items in the order given; `source_id` is what the source calls them, by default their number."""
    items = pd.DataFrame({"title": [one_line(title) for title in titles]}).rename_axis("id").reset_index()
    items["text"] = "" if isinstance(text, str) else [one_line(line) for line in text]
    return items.assign(source_id=[str(s) for s in (items["id"] if source_id is None else source_id)])


def user_table(split: Sequence[str], source_users: Sequence) -> pd.DataFrame:
    """Users in the order given, with their splits and what the source calls them."""
    table = pd.DataFrame({"split": split, "source_id": [str(user) for user in source_users]}, dtype=str)
    return table.rename_axis("user").reset_index()


def assemble(
    items: pd.DataFrame, user: np.ndarray, item: np.ndarray, time: np.ndarray, source_users: Sequence
) -> Tables:
    """Sort events and split users by first event; `user` and `item` index source_users and items."""
    order = np.lexsort((time, user))  # stable: equal times stay in the order of the source
    events = pd.DataFrame({"user": user[order], "item": item[order], "time": time[order]}, dtype=np.int64)
    n = len(source_users)
    rank = events.groupby("user")["time"].min().rank(method="first").to_numpy() - 1
    split = np.array(SPLITS)[(rank >= int(0.8 * n)).astype(int) + (rank >= int(0.9 * n))]
    return Tables(items, events, user_table(split, source_users))


def one_line(text: str) -> str:
    """The text in one line: Unicode NFC, single spaces, and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def same_title(titles: pd.Series) -> pd.Series:
    """Equal for titles that count as one."""
    return titles.astype(str).map(one_line).str.casefold()


def unique_titles(titles: Sequence[str], years: Sequence[str] | None = None) -> list[str]:
    """Titles with the year where years differ under one title, then with (2), (3), ... for later items."""
    table = pd.DataFrame({"title": [one_line(title) for title in titles], "year": years or ""}, dtype=str)
    differ = table.groupby(same_title(table["title"]))["year"].transform("nunique") > 1
    title = table["title"].mask(differ & (table["year"] != ""), table["title"] + " (" + table["year"] + ")")
    while (number := title.groupby(same_title(title)).cumcount() + 1).max() > 1:  # "A (2)" may be a title already
        title = title.mask(number > 1, title + " (" + number.astype(str) + ")")
    return list(title)


def refuse_rows(file: Path, wrong: pd.Series, say: Callable[[int], str], word: str = "line") -> None:
    """Raise UserError for the first row where `wrong`; its index holds the lines of the file, which `say` is given."""
    lines = wrong.index[wrong]
    if len(lines):
        more = f" ({len(lines)} such {word}s)" if len(lines) > 1 else ""
        raise UserError(f"{file}, {word} {lines[0]}: {say(lines[0])}{more}")
