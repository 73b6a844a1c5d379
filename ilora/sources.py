"""Readers: from the files of publishers, of LLaRA and of a user's own, and from the world, to `Tables`.

- LLaRA keeps MovieLens ratings of 3 and more: only so are its 94 + 95 rows the users' last events. So
  does the reader here. Equal times stay in file order, or take that of LLaRA's rows where these lie beside.
- LLaRA's LastFM lists a user's artists in the order of one global list (by id), not of time: no two artists
  occur in both orders. The reader of the publisher's archive orders them by the month of first tagging.

Each reader checks what it reads: a UserError is one sentence with file, line or row, and remedy.
"""

import html
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pooch

from ilora import llara, runs
from ilora.runs import UserError
from ilora.tables import SPLITS, Tables, assemble, item_table, refuse_rows, same_title, unique_titles
from ilora.world import make_world

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
            raise UserError(f"{folder / name} is missing: put it there, or name another folder with data_dir")
    return [folder / name for name in names]


def read_world(conflict: float, users: int, seed: int) -> Tables:
    """The generated world, see `world.make_world`."""
    world = make_world(users=users, conflict=conflict, seed=seed)
    items = item_table(world.items["title"], world.items["text"])
    return assemble(items, *world.events[["user", "item", "time"]].to_numpy().T, range(users))


# ---------------------------------------------------------------- MovieLens and HetRec 2011, from their publishers

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
    folder, archive = runs.home() / "downloads", url.rsplit("/", 1)[1]
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


def _lines(file: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, without empty ones at its end."""
    try:
        return file.read_text(encoding=encoding).rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not {encoding} text from byte {error.start} on: save it as that") from error


_GENRES = [  # of the flags at the end of a line of u.item
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip
_YEAR = re.compile(r"\s*\((\d{4})\)(\s*\(V\))?\s*$")
_ARTICLE = re.compile(r"^(.*?), (The|An|A)(?= \(|$)")


def _read_u_item(file: Path) -> pd.DataFrame:
    """Titles with the year cut off and the article in front; text is year and genres; ids from 1 on."""
    titles, years, text = [], [], []
    for number, line in enumerate(_lines(file, "latin-1"), start=1):
        source_id, title, *_ = row = line.split("|")
        if len(row) != 5 + len(_GENRES) or source_id != str(number):
            raise UserError(f"{file}, line {number}: not film {number} in 24 fields but {line[:40]!r}; fetch it again")
        year = _YEAR.search(title)
        years.append(year[1] if year else "")
        titles.append(_ARTICLE.sub(r"\2 \1", _YEAR.sub("", title)))
        genres = ", ".join(genre for genre, flag in zip(_GENRES, row[5:], strict=True) if flag == "1")
        text.append(f"{year[1]}; {genres}" if year else "")
    return item_table(unique_titles(titles, years), text, range(1, len(titles) + 1))


def _read_numbers(file: Path, columns: Sequence[str], header: int | None) -> pd.DataFrame:
    """A tab-separated table of whole numbers."""
    try:
        return pd.read_csv(file, sep="\t", names=columns, header=header, dtype=np.int64, index_col=False)
    except ValueError as error:  # pandas says which field of which line
        raise UserError(f"{file} is damaged ({str(error).strip()}): fetch it again") from error


def _read_movielens(files: list[Path]) -> Tables:
    """u.data and u.item of MovieLens-100K; LLaRA's rows, if given, settle the order of equal times."""
    data, titles, *rows = files
    items = _read_u_item(titles)
    table = _read_numbers(data, ["user", "item", "rating", "time"], None)
    unknown = ~table["item"].between(1, len(items))
    refuse_rows(data, unknown, lambda row: f"no film {table['item'][row]} in u.item; use one archive", first=1)
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
        for number, (window, last) in enumerate(zip(*llara.read_windows(file, padding), strict=True)):
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
    table = _read_numbers(tags, ["user", "artist", "tag", "time"], 0)
    table = table.groupby(["user", "artist"], as_index=False)["time"].min()
    titles = dict(line.split("\t")[:2] for line in _lines(names)[1:])
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


# ---------------------------------------------------------------- LLaRA's folders


def _read_id2name(file: Path) -> pd.DataFrame:
    """Lines id::title, ids 0..n-1 in order; HTML entities such as &amp; become characters."""
    titles = []
    for number, line in enumerate(_lines(file)):
        source_id, _, title = line.partition("::")
        if source_id != str(number) or not title.strip():
            raise UserError(f"{file}, line {number + 1}: not '{number}::title' but {line!r}; give each id one title")
        titles.append(html.unescape(title.strip()))
    return item_table(unique_titles(titles))


def _read_llara(files: list[Path]) -> Tables:
    """A file of train rows, Val_data.df, Test_data.df and the titles, id2name.txt or MovieLens' u.item."""
    *rows, titles = files
    return llara.read_splits(rows, _read_u_item(titles) if titles.name == "u.item" else _read_id2name(titles))


# ---------------------------------------------------------------- a user's own CSV files


def _refuse_twice(file: Path, keys: pd.Series, say: Callable[[int, int], str]) -> None:
    """Raise for the first row with a key that an earlier row has; `say` is told row and the earlier line."""
    refuse_rows(file, keys.duplicated(), lambda row: say(row, np.flatnonzero(keys == keys[row])[0] + 2))


def _read_table(file: Path, columns: Sequence[str], types: type | dict) -> pd.DataFrame:
    """A CSV file with these columns and perhaps others; only an empty field is empty, "NA" is text."""
    try:
        table = pd.read_csv(
            file, dtype=types, encoding="utf-8-sig", keep_default_na=False, index_col=False, skipinitialspace=True
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a CSV file in UTF-8 ({str(error).strip()}): mend or export it again") from error
    for column in columns:
        if column not in table:
            raise UserError(f"{file} has no column {column!r} but {', '.join(table)}: name its columns in line 1")
    return table


def _read_csv(files: list[Path]) -> Tables:
    """events.csv (user, item, time) and items.csv (id, title, and text if it is there)."""
    event_file, item_file = files
    items = _read_table(item_file, ("id", "title"), str)
    ids, titles = items["id"].str.strip(), items["title"].str.strip()
    refuse_rows(item_file, ids == "", lambda row: "the id is empty; give the item one")
    refuse_rows(item_file, titles == "", lambda row: f"the title of item {ids[row]!r} is empty; give it one")
    _refuse_twice(item_file, ids, lambda row, line: f"id {ids[row]!r} is on line {line} too; keep one of them")
    _refuse_twice(
        item_file,
        same_title(titles),
        lambda row, line: (
            f"title {titles[row]!r} is on line {line} too (case and spaces do not count) and answers "
            "are told apart by title; make them differ, by a year for example"
        ),
    )
    events = _read_table(event_file, ("user", "item", "time"), {"user": str, "item": str})
    codes, names = pd.factorize(events["item"])  # as text: "01" and "1" are two items
    item = pd.Index(ids).get_indexer(names.str.strip())[codes]
    refuse_rows(event_file, events["user"] == "", lambda row: "the user is empty; name one or drop the line")
    refuse_rows(event_file, item < 0, lambda row: f"item {names[codes[row]]!r} is not in items.csv; add it")
    time = _parse_time(event_file, events["time"])
    user, source_users = pd.factorize(events["user"])  # in order of appearance
    return assemble(item_table(titles, items.get("text", ""), ids), user, item, time, source_users)


def _parse_time(file: Path, time: pd.Series) -> np.ndarray:
    """int64: whole numbers as they are, ISO dates as microseconds since 1970 (UTC where they do not say)."""
    if pd.api.types.is_integer_dtype(time):
        return time.to_numpy(np.int64)
    text = time.astype(str)
    dashed = text.str.contains("-")
    if dashed.any():
        values = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce").dt.as_unit("us")
        wrong = values.isna() | ~dashed  # "1717" among dates is no year
    else:
        values = pd.to_numeric(text, errors="coerce")
        wrong = values % 1 != 0
    refuse_rows(
        file,
        wrong,
        lambda row: (
            f"time {text[row]!r} is neither a whole number nor an ISO date; write it as 2024-05-31, as "
            "2024-05-31T18:00:00 or as seconds since 1970, all lines in one way"
        ),
    )
    return values.astype(np.int64).to_numpy()
