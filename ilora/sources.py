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
import io
import itertools
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


def _decode(file: Path, *encodings: str) -> str:
    """The text of a file in the first of these encodings, by default UTF-8, that it is valid in."""
    content = file.read_bytes()
    for encoding in encodings or ("utf-8-sig",):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
        else:
            break
    else:
        raise UserError(f"{file}, line {line}: not text in UTF-8; export the file again as UTF-8 text")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: a NUL byte, so this is no text file; export it again as UTF-8 text")
    return text


def _records(file: Path, text: str, **dialect: object) -> pd.Series:
    """Lists of fields, under the number of the line on which each record begins; blank lines are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    records, lines, line = [], [], 1
    try:
        for fields in reader:
            if len(fields) > 1 or any(map(str.strip, fields)):
                records.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not a record of CSV ({error}); close and double its quotes") from error
    return pd.Series(records, lines, dtype=object)


_TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def _check_widths(file: Path, records: pd.Series, widths: Sequence[int], says: str) -> None:
    """Raise UserError for the first record that has another number of fields than `widths` allow."""
    refuse_rows(file, ~records.map(len).isin(widths), lambda line: f"{len(records[line])} fields, {says}")


def _whole_numbers(file: Path, text: pd.Series) -> np.ndarray:
    """int64, without loss.  Raises UserError for the first text that is no whole number of 64 bits."""
    values = [int(each) if re.fullmatch("[+-]?[0-9]{1,19}", each) else None for each in text]
    wrong = [value is None or not -(2**63) <= value < 2**63 for value in values]
    says = "is not a whole number of at most 64 bits; correct it or export the file again"
    refuse_rows(file, pd.Series(wrong, text.index, dtype=bool), lambda line: f"{text[line]!r} {says}")
    return np.array(values, np.int64)


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


# ---------------------------------------------------------------- LLaRA's folders


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
    return llara.read_splits(rows, _read_u_item(titles) if titles.name == "u.item" else _read_id2name(titles))


# ---------------------------------------------------------------- CSV files of a user


def _refuse_twice(file: Path, keys: pd.Series, say: Callable[[int, int], str]) -> None:
    """Raise for the first row with a key that an earlier row has; `say` is given its line and the earlier one."""
    refuse_rows(file, keys.duplicated(), lambda line: say(line, keys.index[keys == keys[line]][0]))


def _read_table(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The text of these columns of a CSV file, and of `text` if it is there; its index holds the lines of the file."""
    content = _decode(file)
    records = _records(file, content, skipinitialspace=True)
    header = [name.strip() for name in records.iloc[0]] if len(records) else []
    for column in columns:
        if column not in header:
            separator = next((mark for mark in ("::", *";\t|") if len(header) == 1 and mark in header[0]), None)
            remedy = f"export it with commas, not {separator!r}" if separator else "name its columns in line 1"
            raise UserError(f"{file} has no column {column!r} but {', '.join(header) or 'no text'}: {remedy}")
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise UserError(f"{file}, line {records.index[0]}: two columns are named {twice[0]!r}; rename or drop one")
    records = records.iloc[1:]
    _check_widths(
        file,
        records,
        [len(header)],
        f'the first line has {len(header)}; a field with a comma needs quotes, "Good, the Bad"',
    )
    _refuse_swallowed(file, content, records, len(header))
    table = pd.DataFrame(records.tolist(), records.index, range(len(header)), dtype=str)
    for at in [at for at, name in enumerate(header) if not name]:  # as a comma at the end of each line makes one
        refuse_rows(file, table[at].str.strip() != "", lambda line: "a field without a column name; name it in line 1")
    table = table.set_axis(header, axis=1)[[*columns, *{"text"}.intersection(header)]]
    return table.apply(lambda column: column.str.strip())


def _refuse_swallowed(file: Path, content: str, records: pd.Series, width: int) -> None:
    """Raise for a record of several lines that are records too: a quote that was never closed looks like that."""
    starts = records.index.to_numpy()
    lines = io.StringIO(content, newline=None).read().split("\n")
    ends = np.append(starts[1:], len(lines) + 1)
    swallowed = pd.Series(ends - starts > 1, records.index)
    for line, end in zip(starts[swallowed], ends[swallowed], strict=True):
        part = [text for text in lines[line - 1 : end - 1] if text.strip()]  # blank lines may follow a record
        swallowed[line] = len(part) > 1 and all(text.count(",") == width - 1 for text in part)
    says = "a quoted field goes on over lines that look like rows; close its quote, or write the field in one line"
    refuse_rows(file, swallowed, lambda line: says)


def _read_csv(files: list[Path]) -> Tables:
    """events.csv (user, item, time) and items.csv (id, title, and text if it is there)."""
    event_file, item_file = files
    items = _read_table(item_file, ("id", "title"))
    ids, titles = items["id"], items["title"]
    refuse_rows(item_file, ids == "", lambda line: "the id is empty; give the item one")
    refuse_rows(item_file, titles == "", lambda line: f"the title of item {ids[line]!r} is empty; give it one")
    _refuse_twice(item_file, ids, lambda line, first: f"id {ids[line]!r} is on line {first} too; keep one of them")
    _refuse_twice(
        item_file,
        same_title(titles),
        lambda line, first: (
            f"title {titles[line]!r} is on line {first} too (case and spaces do not count) and an answer is matched "
            "by its title; make them differ, by a year for example"
        ),
    )
    events = _read_table(event_file, ("user", "item", "time"))
    item = pd.Series(pd.Index(ids).get_indexer(events["item"]), events.index)  # as text: "01" and "1" are two items
    refuse_rows(event_file, events["user"] == "", lambda line: "the user is empty; name one or drop the line")
    refuse_rows(event_file, item < 0, lambda line: f"item {events['item'][line]!r} is not in items.csv; add it")
    time = _parse_time(event_file, events["time"])
    user, source_users = pd.factorize(events["user"])  # in order of appearance
    return assemble(item_table(titles, items.get("text", ""), ids), user, item.to_numpy(), time, source_users)


_NUMBER = r"[+-]?(?:0|[1-9]\d{0,18})"  # a zero at the front is for a day or an hour, as in 01022024
_DATE = r"\d{4}-\d\d-\d\d"
_CLOCK = r"[T ]\d\d:\d\d(?::\d\d(?:[.]\d{1,6})?)?"
_ZONE = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
_FORMS = re.compile(
    rf"(?P<number>{_NUMBER})|(?P<date>{_DATE})|(?P<time>{_DATE}{_CLOCK})|(?P<zone>{_DATE}{_CLOCK}{_ZONE})",
    re.ASCII,
)
_UNITS = {9: "s", 10: "s", 12: "ms", 13: "ms", 15: "us", 16: "us", 18: "ns", 19: "ns"}  # since 1970, by digits


def _parse_time(file: Path, text: pd.Series) -> np.ndarray:
    """int64: whole numbers as they are, ISO dates as microseconds since 1970 (UTC where they name no zone)."""
    form = pd.Series([(found := _FORMS.fullmatch(each)) and found.lastgroup for each in text], text.index, dtype=object)
    remedy = "write 2024-05-31, 2024-05-31T18:00:00 or seconds since 1970, with all digits and all lines in one way"
    refuse_rows(
        file, form.isna(), lambda line: f"time {text[line]!r} is neither a whole number nor an ISO date; {remedy}"
    )
    refuse_rows(
        file,
        form != next(iter(form), None),
        lambda line: f"time {text[line]!r} is not written like {text.iloc[0]!r}; {remedy}",
    )
    if (form == "number").all():
        _refuse_mixed_units(file, text)
        return _whole_numbers(file, text)
    values = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce").dt.as_unit("us")
    refuse_rows(file, values.isna(), lambda line: f"time {text[line]!r} is no day and time that exists; correct it")
    return values.astype(np.int64).to_numpy()


def _refuse_mixed_units(file: Path, text: pd.Series) -> None:
    """Raise where some times have as many digits as seconds since 1970, others as milliseconds, none between them."""
    digits = text.str.lstrip("+-").str.lstrip("0").str.len()
    for few, many in itertools.pairwise(sorted(digits.unique())):
        if many - few > 1 and few in _UNITS and many in _UNITS:
            like = text[digits == few].iloc[0]
            says = f"time {{}} is in another unit than {like}: {_UNITS[many]} and {_UNITS[few]} since 1970; use one"
            refuse_rows(file, digits == many, lambda line, says=says: says.format(text[line]))
