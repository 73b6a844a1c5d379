"""Readers: from the files of MovieLens, of LLaRA and of users (CSV) to a `Dataset`."""

import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pooch

from ilora import artifacts
from ilora.data import llara_files
from ilora.data.csv_files import decode, read_csv
from ilora.data.dataset import SPLITS, Dataset, assemble, item_table, refuse_rows, unique_titles
from ilora.errors import UserError

_LLARA = "LLaRA's are at https://huggingface.co/datasets/joyliao7777/LLaRA"
_ARCHIVE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip", "md5:0e33842e24a9c977be4e0107933c0723"
_LICENCE = "for research, with acknowledgement; no redistribution or commercial use without permission (see its README)"
_YEAR = re.compile(r"\s*\((\d{4})\)(\s*\(V\))?\s*$")  # at the end of a film's title


def find_source(name: str, data_dir: str) -> tuple[Callable[[list[Path]], Dataset], list[Path]]:
    """The reader for data set `name`, and its files in `data_dir`, its subfolders or a download.  Raises UserError."""
    folder = Path(data_dir).expanduser()
    if not folder.is_dir() or not (data_dir or name == "movielens"):
        hint = "" if name in ("csv", "movielens") else f"; {_LLARA}"
        raise UserError(f"data set {name!r} needs data_dir, the folder with its files, not {data_dir!r}{hint}")
    if name == "csv":
        return read_csv, _require(folder, "events.csv", "items.csv")
    folder = folder if data_dir else _download()
    rows = _folder_with("Test_data.df", folder, folder / name, folder / "llara" / name)
    if name == "movielens":
        ratings = _require(_folder_with("u.data", folder, folder / "ml-100k"), "u.data", "u.item")
        ordered = (rows / "Test_data.df").is_file()
        return read_movielens, ratings + (_require(rows, "Val_data.df", "Test_data.df") if ordered else [])
    train = sorted(file.name for file in rows.glob("train*.df"))
    train = train[0] if train and "train_data.df" not in train else "train_data.df"
    return read_llara, _require(rows, train, "Val_data.df", "Test_data.df", "id2name.txt")


def _folder_with(file: str, *folders: Path) -> Path:
    return next((folder for folder in folders if (folder / file).is_file()), folders[0])


def _require(folder: Path, *names: str) -> list[Path]:
    for name in names:
        if not (folder / name).is_file():
            prefix = name.lower().removesuffix("csv")  # of events.csv.gz, Events.csv, events.tsv
            similar = sorted(file.name for file in folder.iterdir() if file.name.lower().startswith(prefix))
            hint = f"; unpack or export {similar[0]} as {name}" if similar else f"; {_LLARA}" * name.endswith(".df")
            raise UserError(f"{folder / name} is missing: put it there, or name another folder with data_dir{hint}")
    return [folder / name for name in names]


def _download() -> Path:
    """Show the licence of MovieLens, then fetch and unpack its archive, once; the folder with the files."""
    url, checksum = _ARCHIVE
    folder, archive = artifacts.home() / "downloads", url.rsplit("/", 1)[1]
    if not (folder / archive).exists():
        print(f"Downloading {url}\nLicence: {_LICENCE}", flush=True)
    remedy = f"try again, or unpack {url} by hand and name the folder with data_dir"
    try:
        pooch.retrieve(url, checksum, archive, folder, processor=pooch.Unzip(), progressbar=True)
    except ValueError as error:  # pooch: the checksum differs
        raise UserError(f"{archive} arrived damaged (its checksum is not the publisher's): {remedy}") from error
    except OSError as error:
        raise UserError(f"{archive} could not be downloaded ({type(error).__name__}): {remedy}") from error
    return folder / f"{archive}.unzip"


def _lines(text: str) -> pd.Series:
    """The lines that are not blank, indexed by their numbers."""
    lines = enumerate(re.split("\r?\n", text), start=1)
    return pd.Series({number: line for number, line in lines if line.strip()}, dtype=object)


def _read_u_item(file: Path) -> pd.DataFrame:
    """Titles without the year and with the article in front; ids start at 1."""
    lines = _lines(decode(file, ("utf-8-sig", "latin-1")))  # published in latin-1, sometimes converted to UTF-8
    films, number = lines.str.split("|"), pd.Series(range(1, len(lines) + 1), lines.index).astype(str)
    title = films.str[1]
    mixed = title.str.contains("[\x80-\x9f]|\xc3[\x80-\xbf]", na=False)
    refuse_rows(file, mixed, "a title in another encoding than the rest; fetch the file again")
    wrong = (films.map(len) != 24) | (films.str[0] != number) | (title.str.strip() == "")
    refuse_rows(file, wrong, "not film {} in 24 fields but {!r}; fetch the file again", number, lines.str[:40])
    year = title.str.extract(_YEAR)[0].fillna("")
    title = title.str.replace(_YEAR, "", regex=True).str.replace(r"^(.*?), (The|An|A)(?= \(|$)", r"\2 \1", regex=True)
    return item_table(unique_titles(title, year.tolist()), source_id=number)


def read_movielens(files: list[Path]) -> Dataset:
    """u.data (ratings of 3 and more, as in LLaRA) and u.item; LLaRA's rows, if given, order events of equal time."""
    ratings, titles, *rows = files
    items, lines = _read_u_item(titles), _lines(decode(ratings))
    pattern = "\t".join(f"(?P<{name}>[0-9]{{1,18}})" for name in ("user", "item", "rating", "time"))
    table = lines.str.extract(f"^{pattern}$")
    message = "not four whole numbers separated by tabs (user, film, rating, time) but {!r}; fetch the file again"
    refuse_rows(ratings, table["user"].isna(), message, lines)
    table = table.astype("int64")
    film = table["item"]
    refuse_rows(ratings, ~film.between(1, len(items)), "no film {} in u.item; use one archive", film)
    notes = () if len(table) == 100_000 else (f"u.data has {len(table)} ratings, as published it has 100000",)
    table = table[table["rating"] >= 3]
    user, source_users = pd.factorize(table["user"], sort=True)
    source = assemble(items, user, table["item"].to_numpy() - 1, table["time"].to_numpy(), source_users)
    for split, file in zip(SPLITS[1:], rows, strict=False):
        source = _order_equal_times(source, split, file)
    return replace(source, notes=notes)


def _order_equal_times(source: Dataset, split: str, file: Path) -> Dataset:
    """Order the events with equal times as in LLaRA's rows of the split, each of which is a user's last events."""
    of_split = source.events[source.events["user"].map(source.users["split"]) == split]
    histories = [(set(events["item"]), events) for _, events in of_split.groupby("user")]
    place = pd.Series(0, source.events.index)  # in LLaRA's row, from 1
    for number, row in enumerate(llara_files.read_rows(file, len(source.items))[0]):
        for events in (events for items, events in histories if items.issuperset(row)):
            in_row = events["item"].isin(row)
            if events["time"][in_row].tolist() == events["time"].tail(len(row)).tolist():  # its last, but for ties
                place[events.index[in_row]] = [1 + row.index(item) for item in events["item"][in_row]]
                break
        else:
            raise UserError(f"{file}, row {number}: no {split} user ends so; use LLaRA's rows of MovieLens-100K")
    events = source.events.assign(place=place).sort_values(["user", "time", "place"], kind="stable")
    return replace(source, events=events.drop(columns="place").reset_index(drop=True))


def read_llara(files: list[Path]) -> Dataset:
    """A file of train rows, Val_data.df, Test_data.df and id2name.txt with lines id::title, ids 0..n-1 in order."""
    *rows, names = files
    lines = _lines(decode(names))
    number, parts = pd.Series(range(len(lines)), lines.index).astype(str), lines.str.extract(r"(.*?)::(.*\S)")
    refuse_rows(names, parts[0] != number, "not '{}::title' but {!r}; give each id one title", number, lines)
    titles = parts[1].map(html.unescape).str.strip()  # &amp; and the like
    refuse_rows(names, titles == "", "the title is empty; give the item one")
    return llara_files.read_splits(rows, item_table(unique_titles(titles)))
