"""Readers: from the files of publishers, of LLaRA and of users (CSV), and from the world, to `Tables`.

- LLaRA keeps MovieLens ratings of 3 and more: only so are its 94 + 95 rows the users' last events. So
  does the reader here. Equal times stay in file order, or take that of LLaRA's rows where these lie beside.
- LLaRA's LastFM lists a user's artists in the order of one global list (by id), not of time: no two artists
  occur in both orders. The reader of the publisher's archive orders them by the month of first tagging.

Each reader checks what it reads: a UserError is one sentence with file, line or row, and remedy. A file that could be
read in two ways is refused, not guessed at.
"""

import csv
import html
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pooch

from ilora import artifacts
from ilora.data import llara_files
from ilora.data.csv_files import _check_widths, _decode, _read_csv, _records, _refuse_twice, _whole_numbers
from ilora.data.tables import SPLITS, Tables, assemble, item_table, refuse_rows, unique_titles
from ilora.data.world import make_world
from ilora.errors import UserError

Reader = Callable[[list[Path]], Tables]


def find_source(name: str, data_dir: str) -> tuple[Reader, list[Path]]:
    """The reader for data set `name` and the files that it reads, all of which exist.

    They are looked for in `data_dir` and the subfolders that the files are usually unpacked to; where it is
    empty, MovieLens and Last.fm are downloaded (licence shown first, checksum compared). Raises UserError.
    """
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir!r} is not a folder: name the one with the files of {name}")
    if not data_dir and name not in _ARCHIVES:
        hint = "" if name == "csv" else "; LLaRA's are at https://huggingface.co/datasets/joyliao7777/LLaRA"
        raise UserError(f"data set {name!r} needs data_dir, the folder with its files{hint}")
    if not data_dir:
        folder = _download(name)

    def place(file: str, *subfolders: str) -> Path | None:
        return next((folder / sub for sub in ("", *subfolders) if (folder / sub / file).is_file()), None)

    if name == "csv":
        return _read_csv, _require(folder, "events.csv", "items.csv")
    if name == "movielens" and (where := place("u.data", "ml-100k")):
        rows = place("Test_data.df", "llara/movielens")
        rows = _require(rows, "Val_data.df", "Test_data.df") if rows else []
        return _read_movielens, _require(where, "u.data", "u.item") + rows
    if name == "lastfm" and (where := place(_TAGS)):
        return _read_hetrec, _require(where, _TAGS, "artists.dat")
    where = place("Test_data.df", name, f"llara/{name}")
    if where is None:
        wanted = {"movielens": "u.data", "lastfm": f"Test_data.df or {_TAGS}"}.get(name, "Test_data.df")
        raise UserError(f"{folder} has no {wanted}: name the folder with the files of {name} with data_dir")
    train = sorted(file.name for file in where.glob("train*.df"))
    train = train[0] if train and "train_data.df" not in train else "train_data.df"
    titles = "id2name.txt" if (where / "id2name.txt").is_file() else "u.item"
    return _read_llara, _require(where, train, "Val_data.df", "Test_data.df", titles)


def _require(folder: Path, *names: str) -> list[Path]:
    for name in names:
        if not (folder / name).is_file():
            like = name.lower().removesuffix("csv")  # events.csv.gz, Events.csv, events.tsv
            near = sorted(file.name for file in folder.iterdir() if file.name.lower().startswith(like))
            hint = f"; unpack or export {near[0]} as {name}" if near else ""
            raise UserError(f"{folder / name} is missing: put it there, or name another folder with data_dir{hint}")
    return [folder / name for name in names]


def read_world(conflict: float, users: int, seed: int) -> Tables:
    """The generated world, see `world.make_world`."""
    world = make_world(users=users, conflict=conflict, seed=seed)
    items = item_table(world.items["title"], world.items["text"])
    return assemble(items, *world.events[["user", "item", "time"]].to_numpy().T, range(users))


_ARCHIVES = {  # url, checksum, licence.  GroupLens publishes the md5; the sha256 is what several projects pin
    "movielens": (
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "md5:0e33842e24a9c977be4e0107933c0723",
        "MovieLens-100K, GroupLens, University of Minnesota: for research; acknowledge it in publications; "
        "no redistribution and no commercial use without permission (full text: README in the archive)",
    ),
    "lastfm": (
        "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",
        "sha256:6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
        "HetRec 2011 LastFM, Cantador, Brusilovsky and Kuflik, from Last.fm: for non-commercial use; cite "
        "the HetRec 2011 workshop and Last.fm (full text: readme.txt in the archive)",
    ),
}
_TAGS = "user_taggedartists-timestamps.dat"


def _download(name: str) -> Path:
    """Fetch and unpack a publisher's archive once, its licence shown before; the folder with its files."""
    url, checksum, licence = _ARCHIVES[name]
    folder, archive = artifacts.home() / "downloads", url.rsplit("/", 1)[1]
    if not (folder / archive).exists():
        print(f"Downloading {url}\nLicence: {licence}", flush=True)
    remedy = f"try again, or unpack {url} by hand and name the folder with data_dir"
    try:
        pooch.retrieve(url, checksum, archive, folder, processor=pooch.Unzip(), progressbar=True)
    except (ValueError, zipfile.BadZipFile) as error:  # pooch: the checksum differs
        raise UserError(f"{archive} arrived damaged (another checksum than its publisher's): {remedy}") from error
    except OSError as error:
        raise UserError(f"{archive} could not be downloaded ({type(error).__name__}): {remedy}") from error
    return folder / f"{archive}.unzip"


_TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


_GENRES = [  # of the flags at the end of a line of u.item
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip
_YEAR = re.compile(r"\s*\((\d{4})\)(\s*\(V\))?\s*$")
_ARTICLE = re.compile(r"^(.*?), (The|An|A)(?= \(|$)")


def _read_u_item(file: Path) -> pd.DataFrame:
    """Titles with the year cut off and the article in front; text is year and genres; ids from 1 on.

    The published file is in latin-1 and not valid UTF-8; a copy that is valid UTF-8 was converted.
    """
    titles, years, text = [], [], []
    records = _records(file, _decode(file, "utf-8-sig", "latin-1"), delimiter="|", quoting=csv.QUOTE_NONE)
    mixed = records.map(lambda row: bool(re.search("[\x80-\x9f]|\xc3[\x80-\xbf]", row[1] if len(row) > 1 else "")))
    refuse_rows(file, mixed, lambda line: "a title in another encoding than the rest; fetch the file again")
    for number, (line, row) in enumerate(records.items(), start=1):
        if len(row) != 5 + len(_GENRES) or row[0] != str(number) or not row[1].strip():
            raise UserError(
                f"{file}, line {line}: not film {number} in 24 fields but {'|'.join(row)[:40]!r}; fetch it again"
            )
        title = row[1]
        year = _YEAR.search(title)
        years.append(year[1] if year else "")
        titles.append(_ARTICLE.sub(r"\2 \1", _YEAR.sub("", title)))
        genres = ", ".join(genre for genre, flag in zip(_GENRES, row[5:], strict=True) if flag == "1")
        text.append(f"{year[1]}; {genres}" if year else "")
    return item_table(unique_titles(titles, years), text, range(1, len(titles) + 1))


def _read_numbers(file: Path, columns: Sequence[str], header: bool = False) -> pd.DataFrame:
    """A tab-separated table of whole numbers; its index holds the lines of the file."""
    records = _records(file, _decode(file), **_TABS)[int(header) :]
    _check_widths(file, records, [len(columns)], f"not {len(columns)} separated by tabs; fetch the file again")
    table = pd.DataFrame(records.tolist(), records.index, columns, dtype=str)
    return table.apply(lambda column: _whole_numbers(file, column))


def _read_movielens(files: list[Path]) -> Tables:
    """u.data and u.item of MovieLens-100K; LLaRA's rows, if given, settle the order of equal times."""
    data, titles, *rows = files
    items = _read_u_item(titles)
    table = _read_numbers(data, ["user", "item", "rating", "time"])
    unknown = ~table["item"].between(1, len(items))
    refuse_rows(data, unknown, lambda line: f"no film {table['item'][line]} in u.item; use one archive")
    notes = () if len(table) == 100_000 else (f"u.data has {len(table)} ratings, as published it has 100000",)
    table = table[table["rating"] >= 3]
    user, source_users = pd.factorize(table["user"], sort=True)
    tables = assemble(items, user, table["item"].to_numpy() - 1, table["time"].to_numpy(), source_users)
    return (_settle_ties(tables, rows) if rows else tables)._replace(notes=notes)


def _settle_ties(tables: Tables, rows: list[Path]) -> Tables:
    """Put equal times in the order of LLaRA's validation and test rows, each a user's last events."""
    items, events, users, _ = tables
    padding = len(items)
    user, item, time = (events[column].to_numpy() for column in ("user", "item", "time"))
    place = np.zeros(len(events), dtype=np.int64)
    for split, file in zip(SPLITS[1:], rows, strict=True):
        ids = users["user"][users["split"] == split]
        spans = [slice(*np.searchsorted(user, [id_, id_ + 1])) for id_ in ids]
        sets = [set(item[span]) for span in spans]
        for number, (window, last) in enumerate(zip(*llara_files.read_windows(file, padding), strict=True)):
            at = {id_: 1 + index for index, id_ in enumerate([*window[window != padding], last])}
            for span in (span for span, own in zip(spans, sets, strict=True) if own.issuperset(at)):
                order = np.array([at.get(id_, 0) for id_ in item[span]])
                if np.array_equal(time[span][order > 0], time[span][-len(at) :]):  # its last, equal times aside
                    place[span] = order
                    break
            else:
                raise UserError(f"{file}, row {number}: no {split} user ends so; use LLaRA's rows of MovieLens-100K")
    return tables._replace(events=events.iloc[np.lexsort((place, time, user))].reset_index(drop=True))


_CORE = 4  # the fewest events of a user, and of an artist but for cut-off rows, in LLaRA's LastFM


def _read_hetrec(files: list[Path]) -> Tables:
    """Artists that each user tagged, by first tagging, then id; of users and artists with _CORE or more."""
    tags, names = files
    table = _read_numbers(tags, ["user", "artist", "tag", "time"], header=True)
    table = table.groupby(["user", "artist"], as_index=False)["time"].min()
    records = _records(names, _decode(names), **_TABS)[1:]
    _check_widths(names, records, range(2, 5), "not id, name, url and picture separated by tabs; fetch the file again")
    refuse_rows(names, records.map(lambda fields: not fields[1].strip()), lambda line: "no name; fetch the file again")
    ids = records.map(lambda fields: fields[0])
    _refuse_twice(names, ids, lambda line, first: f"id {ids[line]!r} is on line {first} too; keep one of them")
    titles = dict(fields[:2] for fields in records)
    table = table[table["artist"].astype(str).isin(titles.keys())]  # a few tagged artists have no name
    before = None
    while before != len(table):
        before = len(table)
        for column in ("artist", "user"):
            table = table[table.groupby(column)["time"].transform("size") >= _CORE]
    user, source_users = pd.factorize(table["user"], sort=True)
    artist, artists = pd.factorize(table["artist"], sort=True)
    items = item_table(unique_titles([titles[str(a)] for a in artists]), source_id=artists)
    tables = assemble(items, user, artist, table["time"].to_numpy(), source_users)
    return tables._replace(notes=("histories are in order of first tagging; LLaRA's are in order of artist ids",))


def _read_id2name(file: Path) -> pd.DataFrame:
    """Lines id::title, ids 0..n-1 in order; HTML entities such as &amp; become characters."""
    titles = []
    for number, line in enumerate(re.split("\r?\n", _decode(file).rstrip())):
        source_id, _, title = line.partition("::")
        if source_id != str(number) or not title.strip():
            raise UserError(f"{file}, line {number + 1}: not '{number}::title' but {line!r}; give each id one title")
        titles.append(html.unescape(title.strip()))
    return item_table(unique_titles(titles))


def _read_llara(files: list[Path]) -> Tables:
    """A file of train rows, Val_data.df, Test_data.df and the titles, id2name.txt or MovieLens' u.item."""
    *rows, titles = files
    return llara_files.read_splits(rows, _read_u_item(titles) if titles.name == "u.item" else _read_id2name(titles))
