"""Readers: from the files of publishers, of LLaRA and of users (CSV) to a `Dataset`.

- MovieLens: ratings of 3 and more, as in LLaRA, whose 94 + 95 rows are then the users' last events.
- LastFM: LLaRA lists a user's artists in the order of one global list, not by time; the reader of the publisher's
  archive orders them by the month in which the user first tagged them.
"""

import csv
import html
import itertools
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pooch

from ilora import artifacts
from ilora.data import llara_files
from ilora.data.csv_files import decode, read_csv, records, refuse_repeats, whole_numbers
from ilora.data.dataset import SPLITS, Dataset, assemble, item_table, refuse_rows, unique_titles
from ilora.errors import UserError

_TAGS = "user_taggedartists-timestamps.dat"
_TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def find_source(name: str, data_dir: str) -> tuple[Callable[[list[Path]], Dataset], list[Path]]:
    """The reader for data set `name`, and its files in `data_dir`, its usual subfolders or a download.

    Raises UserError if a file is missing or cannot be downloaded.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir!r} is not a folder: name the one with the files of {name}")
    if not data_dir and name not in _ARCHIVES:
        hint = "" if name == "csv" else "; LLaRA's are at https://huggingface.co/datasets/joyliao7777/LLaRA"
        raise UserError(f"data set {name!r} needs data_dir, the folder with its files{hint}")
    if not data_dir:
        folder = _download(name)

    def folder_with(file: str, *subfolders: str) -> Path | None:
        return next((folder / sub for sub in ("", *subfolders) if (folder / sub / file).is_file()), None)

    if name == "csv":
        return read_csv, _require(folder, "events.csv", "items.csv")
    if name == "movielens" and (ratings := folder_with("u.data", "ml-100k")):
        rows = folder_with("Test_data.df", "llara/movielens")
        rows = _require(rows, "Val_data.df", "Test_data.df") if rows else []
        return read_movielens, _require(ratings, "u.data", "u.item") + rows
    if name == "lastfm" and (tags := folder_with(_TAGS)):
        return read_hetrec, _require(tags, _TAGS, "artists.dat")
    if (rows := folder_with("Test_data.df", name, f"llara/{name}")) is None:
        missing = {"movielens": "u.data", "lastfm": f"Test_data.df or {_TAGS}"}.get(name, "Test_data.df")
        raise UserError(f"{folder} has no {missing}: name the folder with the files of {name} with data_dir")
    train = sorted(file.name for file in rows.glob("train*.df"))
    train = train[0] if train and "train_data.df" not in train else "train_data.df"
    titles = "id2name.txt" if (rows / "id2name.txt").is_file() else "u.item"
    return read_llara, _require(rows, train, "Val_data.df", "Test_data.df", titles)


def _require(folder: Path, *names: str) -> list[Path]:
    for name in names:
        if not (folder / name).is_file():
            prefix = name.lower().removesuffix("csv")  # of events.csv.gz, Events.csv, events.tsv
            similar = sorted(file.name for file in folder.iterdir() if file.name.lower().startswith(prefix))
            hint = f"; unpack or export {similar[0]} as {name}" if similar else ""
            raise UserError(f"{folder / name} is missing: put it there, or name another folder with data_dir{hint}")
    return [folder / name for name in names]


_ARCHIVES = {  # url, checksum, licence.  GroupLens publishes the md5; the sha256 is what several projects pin
    "movielens": (
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "md5:0e33842e24a9c977be4e0107933c0723",
        "for research; acknowledge it in publications; no redistribution and no commercial use without permission "
        "(full text: README in the archive)",
    ),
    "lastfm": (
        "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",
        "sha256:6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
        "for non-commercial use; cite the HetRec 2011 workshop and Last.fm (full text: readme.txt in the archive)",
    ),
}


def _download(name: str) -> Path:
    """Show the licence of a publisher's archive, then fetch and unpack it, once; the folder with its files."""
    url, checksum, licence = _ARCHIVES[name]
    folder, archive = artifacts.home() / "downloads", url.rsplit("/", 1)[1]
    if not (folder / archive).exists():
        print(f"Downloading {url}\nLicence: {licence}", flush=True)
    remedy = f"try again, or unpack {url} by hand and name the folder with data_dir"
    try:
        pooch.retrieve(url, checksum, archive, folder, processor=pooch.Unzip(), progressbar=True)
    except (ValueError, zipfile.BadZipFile) as error:  # pooch: the checksum differs
        raise UserError(f"{archive} arrived damaged (its checksum is not the publisher's): {remedy}") from error
    except OSError as error:
        raise UserError(f"{archive} could not be downloaded ({type(error).__name__}): {remedy}") from error
    return folder / f"{archive}.unzip"


_GENRES = [  # of the flags at the end of a line of u.item
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip
_YEAR = re.compile(r"\s*\((\d{4})\)(\s*\(V\))?\s*$")
_ARTICLE = re.compile(r"^(.*?), (The|An|A)(?= \(|$)")


def _read_u_item(file: Path) -> pd.DataFrame:
    """Titles without the year and with the article in front; text is year and genres; ids start at 1.

    The published file is in latin-1 and not valid UTF-8; a copy that is valid UTF-8 was converted.
    """
    films = records(file, "utf-8-sig", "latin-1", delimiter="|", quoting=csv.QUOTE_NONE)
    number, title = pd.Series(range(1, len(films) + 1), films.index), films.str[1]
    mixed = title.str.contains("[\x80-\x9f]|\xc3[\x80-\xbf]", na=False)
    refuse_rows(file, mixed, "a title in another encoding than the rest; fetch the file again")
    wrong = (films.map(len) != 5 + len(_GENRES)) | (films.str[0] != number.astype(str)) | (title.str.strip() == "")
    given = films.map("|".join).str[:40]
    refuse_rows(file, wrong, "not film {} in 24 fields but {!r}; fetch it again", number, given)
    year = title.str.extract(_YEAR)[0].fillna("")
    genres = films.map(lambda fields: ", ".join(itertools.compress(_GENRES, map("1".__eq__, fields[5:]))))
    title = title.str.replace(_YEAR, "", regex=True).str.replace(_ARTICLE, r"\2 \1", regex=True)
    return item_table(unique_titles(title, year.tolist()), (year + "; " + genres).where(year != "", ""), number)


def _read_numbers(file: Path, *columns: str, header: int = 0) -> pd.DataFrame:
    """A tab-separated table of whole numbers after `header` lines; its index holds line numbers."""
    rows = records(file, **_TABS)[header:]
    width, message = rows.map(len), f"{{}} fields, not {len(columns)} separated by tabs; fetch the file again"
    refuse_rows(file, width != len(columns), message, width)
    table = pd.DataFrame(rows.tolist(), rows.index, columns, dtype=str)
    return table.apply(lambda column: whole_numbers(file, column))


def read_movielens(files: list[Path]) -> Dataset:
    """u.data and u.item of MovieLens-100K; LLaRA's rows, if given, decide the order of equal times."""
    ratings, titles, *rows = files
    items = _read_u_item(titles)
    table = _read_numbers(ratings, "user", "item", "rating", "time")
    unknown = ~table["item"].between(1, len(items))
    refuse_rows(ratings, unknown, "no film {} in u.item; use one archive", table["item"])
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
    for number, row in enumerate(llara_files.read_rows(file, source.padding)[0]):
        for events in (events for items, events in histories if items.issuperset(row)):
            in_row = events["item"].isin(row)
            if events["time"][in_row].tolist() == events["time"].tail(len(row)).tolist():  # its last, but for ties
                place[events.index[in_row]] = [1 + row.index(item) for item in events["item"][in_row]]
                break
        else:
            raise UserError(f"{file}, row {number}: no {split} user ends so; use LLaRA's rows of MovieLens-100K")
    events = source.events.assign(place=place).sort_values(["user", "time", "place"], kind="stable")
    return replace(source, events=events.drop(columns="place").reset_index(drop=True))


def read_hetrec(files: list[Path]) -> Dataset:
    """Each user's artists in the order of first tagging, then id; users and artists with at least 4, as in LLaRA."""
    tags, names = files
    table = _read_numbers(tags, "user", "artist", "tag", "time", header=1)
    table = table.groupby(["user", "artist"], as_index=False)["time"].min()
    artists = records(names, **_TABS)[1:]
    width, message = (
        artists.map(len),
        "{} fields, not id, name, url and picture separated by tabs; fetch the file again",
    )
    refuse_rows(names, ~width.isin([2, 3, 4]), message, width)
    ids, titles = artists.str[0], artists.str[1]
    refuse_rows(names, titles.str.strip() == "", "no name; fetch the file again")
    refuse_repeats(names, ids, "id {!r} is on line {} too; keep one of them", ids)
    table["title"] = table["artist"].astype(str).map(dict(zip(ids, titles, strict=True)))
    table, before = table.dropna(), None  # a few tagged artists have no name
    while before != len(table):
        before = len(table)
        for column in ("artist", "user"):
            table = table[table.groupby(column)["time"].transform("size") >= 4]
    user, source_users = pd.factorize(table["user"], sort=True)
    artist, source_artists = pd.factorize(table["artist"], sort=True)
    titles = table.drop_duplicates("artist").sort_values("artist")["title"]
    items = item_table(unique_titles(titles), source_id=source_artists)
    source = assemble(items, user, artist, table["time"].to_numpy(), source_users)
    return replace(source, notes=("histories are in order of first tagging; LLaRA's are in order of artist ids",))


def _read_id2name(file: Path) -> pd.DataFrame:
    """Lines id::title, ids 0..n-1 in order; HTML entities such as &amp; become characters."""
    titles = []
    for number, line in enumerate(re.split("\r?\n", decode(file).rstrip())):
        source_id, _, title = line.partition("::")
        if source_id != str(number) or not title.strip():
            raise UserError(f"{file}, line {number + 1}: not '{number}::title' but {line!r}; give each id one title")
        titles.append(html.unescape(title.strip()))
    return item_table(unique_titles(titles))


def read_llara(files: list[Path]) -> Dataset:
    """A file of train rows, Val_data.df, Test_data.df and the titles, id2name.txt or MovieLens' u.item."""
    *rows, titles = files
    return llara_files.read_splits(rows, _read_u_item(titles) if titles.name == "u.item" else _read_id2name(titles))
