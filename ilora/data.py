"""Items, histories, splits and candidate sets, and the readers that make them from five kinds of source.

Decisions that hold for every source:

- Answers are told apart by title, so titles are unique; case and repeated spaces do not count. Published
  data keep all items: where films of several years share a title each gets its year, and what is still alike
  gets " (2)", " (3)". A user's own data are refused instead, naming the lines that clash.
- Splits are by user: by first event, the first 80 % train, the next 10 % validation, the rest test, as
  in LLaRA (754, 94 and 95 users of MovieLens-100K). LLaRA's own files bring their own split.
- LLaRA keeps MovieLens ratings of 3 and more: only so are its 94 + 95 rows the users' last events. So
  does the reader here. Equal times stay in file order, or take that of LLaRA's rows where these lie beside.
- LLaRA's LastFM lists a user's artists in the order of one global list (by id), not of time: no two artists
  occur in both orders. The reader of the publisher's archive orders them by the month of first tagging.
"""

import hashlib
import html
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pooch

from ilora import runs
from ilora.runs import UserError
from ilora.world import make_world

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
MIN_HISTORY = 3  # LLaRA drops windows with fewer items before the target
CANDIDATES = 20  # the target and 19 others
_FORMAT = 1  # part of every key: raise it when a reader's result changes

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
    dataset: str = "world", data_dir: str = "", conflict: float = 0.5, users: int = 2000, seed: int = 0
) -> Dataset:
    """The data set of that name; read once, then kept in `runs.home()/data/<key>`.

    dataset: world, movielens, lastfm, steam, llara (a folder of LLaRA's files) or csv (a folder with
        events.csv: user, item, time, and items.csv: id, title, and text if there is any).
    data_dir: the folder with the files or one above it (ml-100k, llara/lastfm, ... are looked for). Empty:
        the world is drawn; MovieLens and LastFM are downloaded, licence shown first, checksum compared.
    conflict, users, seed: of the world.
    Raises UserError: one sentence with file, line or row, and remedy.
    """
    if dataset == "world":  # cheap to draw again, and its code may change: its content is part of the key
        world = _read_world(conflict, users, seed)
        knobs = {"conflict": conflict, "users": users, "seed": seed}
        return _keep(dataset, knobs | {"content": _content(world)}, lambda: world)
    if dataset not in WORDS:
        raise UserError(f"there is no data set {dataset!r}: choose among {', '.join(WORDS)}")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir!r} is not a folder: name the one with the files of {dataset}")
    if not data_dir and dataset not in _ARCHIVES:
        hint = "" if dataset == "csv" else "; LLaRA's are at https://huggingface.co/datasets/joyliao7777/LLaRA"
        raise UserError(f"data set {dataset!r} needs data_dir, the folder with its files{hint}")
    read, files = _find_source(dataset, folder if data_dir else _download(dataset))
    source = {"reader": read.__name__, "files": {file.name: _sha256(file) for file in files}}
    return _keep(dataset, source, lambda: read(files))


def _keep(name: str, parameters: dict, read: Callable[[], Dataset]) -> Dataset:
    """The stored copy for these parameters; read, checked and stored first if there is none."""
    parameters = {"dataset": name, "format": _FORMAT, **parameters}
    noun, verb = WORDS[name]

    def make(folder: Path) -> None:
        dataset = replace(read(), name=name, key=runs.key(parameters), noun=noun, verb=verb)
        _check_usable(dataset)
        dataset._write(folder)

    dataset = load_dataset(runs.cached("data", parameters, make, note=name))
    for note in dataset.notes:
        log.warning("%s: %s", name, note)
    return dataset


def _content(dataset: Dataset) -> str:
    digest = hashlib.sha256(dataset.items.to_csv(index=False).encode())
    digest.update(dataset.events.to_numpy().tobytes())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
    count = np.bincount(user, minlength=len(dataset.users))
    position = _position(user, count)
    wanted = (dataset.users["split"] == split).to_numpy()[user] & (position >= min_history)
    if windows == "last":
        wanted &= position == count[user] - 1
    row = np.flatnonzero(wanted)
    position = position[row]
    history = np.full((len(row), window), dataset.padding, dtype=np.int64)
    for back in range(1, window + 1):  # a column at a time: no (n, window) index array
        there = position >= back
        history[there, -back] = item[row[there] - back]
    return Sequences(user[row], position, history, np.minimum(position, window), item[row])


def _position(user: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Index of each event among its user's; events are sorted by user, `count` is each user's number."""
    return np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)


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
    chunk = 4096  # rows whose work fits a processor's cache
    parts = [slice(at, at + chunk) for at in range(0, max(len(sequences), 1), chunk)]
    return np.concatenate([_choose(sequences.take(part), n_items, seed, size) for part in parts])


def _choose(sequences: Sequences, n_items: int, seed: int, size: int) -> np.ndarray:
    history, target, rows = sequences.history, sequences.target, np.arange(len(sequences))
    state = _mix(np.full(len(target), seed, dtype=np.uint64))
    for column in history.T:  # padding leaves no trace, so the window's width does not matter
        state = np.where(column < n_items, _mix(state ^ column.astype(np.uint64)), state)
    state = _mix(state ^ target.astype(np.uint64))
    taken = np.concatenate([target[None], history.T, np.empty((size - 1, len(target)), dtype=np.int64)])
    draws = np.zeros(len(target), dtype=np.uint64)
    for column in range(len(taken) - size + 1, len(taken)):
        pending = rows
        while len(pending):  # draw again where the item is taken
            draws[pending] += np.uint64(1)
            item = (_mix(state[pending] + draws[pending] * _GOLDEN) % np.uint64(n_items)).astype(np.int64)
            taken[column, pending] = item
            pending = pending[(taken[:column, pending] == item).any(axis=0)]
    chosen = np.column_stack([*taken[1 - size :], target])
    place = (_mix(state) % np.uint64(size)).astype(np.int64)
    chosen[:, -1], chosen[rows, place] = chosen[rows, place], target
    return chosen


# ---------------------------------------------------------------- from a source to the one form


def _read_world(conflict: float, users: int, seed: int) -> Dataset:
    world = make_world(users=users, conflict=conflict, seed=seed)
    items = _items(world.items["title"], world.items["text"])
    return _assemble(items, *world.events[["user", "item", "time"]].to_numpy().T, range(users))


def _items(titles: Sequence[str], text: Sequence[str] | str = "", source_id: Sequence | None = None) -> pd.DataFrame:
    items = pd.DataFrame({"title": list(titles)}).rename_axis("id").reset_index()
    return items.assign(text=text, source_id=[str(s) for s in (items["id"] if source_id is None else source_id)])


def _assemble(
    items: pd.DataFrame, user: np.ndarray, item: np.ndarray, time: np.ndarray, source_users: Sequence
) -> Dataset:
    """Sort events and split users by first event; `user` and `item` index source_users and items."""
    order = np.lexsort((time, user))  # stable: equal times stay in the order of the source
    events = pd.DataFrame({"user": user[order], "item": item[order], "time": time[order]}, dtype=np.int64)
    n = len(source_users)
    rank = events.groupby("user")["time"].min().rank(method="first").to_numpy() - 1
    split = np.array(SPLITS)[(rank >= int(0.8 * n)).astype(int) + (rank >= int(0.9 * n))]
    return Dataset(items, events, _users(split, source_users))


def _users(split: Sequence[str], source_users: Sequence) -> pd.DataFrame:
    table = pd.DataFrame({"split": split, "source_id": [str(user) for user in source_users]}, dtype=str)
    return table.rename_axis("user").reset_index()


def _same_title(titles: pd.Series) -> pd.Series:
    """Equal for titles that count as one."""
    return titles.str.split().str.join(" ").str.casefold()


def _unique_titles(titles: Sequence[str], years: Sequence[str] | None = None) -> list[str]:
    """Titles with the year where years differ under one title, then with (2), (3), ... for later items."""
    table = pd.DataFrame({"title": titles, "year": years or ""}, dtype=str)
    differ = table.groupby(_same_title(table["title"]))["year"].transform("nunique") > 1
    title = table["title"].mask(differ & (table["year"] != ""), table["title"] + " (" + table["year"] + ")")
    number = title.groupby(_same_title(title)).cumcount() + 1
    return list(title.mask(number > 1, title + " (" + number.astype(str) + ")"))


# ---------------------------------------------------------------- where the files are

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


def _find_source(name: str, folder: Path) -> tuple[Callable[[list[Path]], Dataset], list[Path]]:
    """The reader for what lies in `folder`, and the files that it reads."""

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


def _lines(file: Path, encoding: str = "utf-8") -> list[str]:
    try:
        return file.read_text(encoding=encoding).rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not {encoding} text from byte {error.start} on: save it as that") from error


# ---------------------------------------------------------------- MovieLens and HetRec 2011

_GENRES = [
    *["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"],
    *[
        "Fantasy",
        "Film-Noir",
        "Horror",
        "Musical",
        "Mystery",
        "Romance",
        "Sci-Fi",
        "Thriller",
        "War",
        "Western",
    ],
]
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
    return _items(_unique_titles(titles, years), text, range(1, len(titles) + 1))


def _read_numbers(file: Path, columns: Sequence[str], header: int | None) -> pd.DataFrame:
    """A tab-separated table of whole numbers."""
    try:
        return pd.read_csv(file, sep="\t", names=columns, header=header, dtype=np.int64, index_col=False)
    except ValueError as error:  # pandas says which field of which line
        raise UserError(f"{file} is damaged ({str(error).strip()}): fetch it again") from error


def _read_movielens(files: list[Path]) -> Dataset:
    """u.data and u.item of MovieLens-100K; LLaRA's rows, if given, settle the order of equal times."""
    data, titles, *rows = files
    items = _read_u_item(titles)
    table = _read_numbers(data, ["user", "item", "rating", "time"], None)
    _refuse(
        data,
        ~table["item"].between(1, len(items)),
        lambda row: f"no film {table['item'][row]} in u.item; use one archive",
        1,
    )
    notes = () if len(table) == 100_000 else (f"u.data has {len(table)} ratings, as published it has 100000",)
    table = table[table["rating"] >= 3]
    user, source_users = pd.factorize(table["user"], sort=True)
    dataset = _assemble(items, user, table["item"].to_numpy() - 1, table["time"].to_numpy(), source_users)
    return replace(_settle_ties(dataset, rows) if rows else dataset, notes=notes)


def _settle_ties(dataset: Dataset, rows: list[Path]) -> Dataset:
    """Put equal times in the order of LLaRA's validation and test rows, each a user's last events."""
    events = dataset.events
    user, item, time = (events[column].to_numpy() for column in ("user", "item", "time"))
    place = np.zeros(len(events), dtype=np.int64)
    for split, file in zip(SPLITS[1:], rows, strict=True):
        ids = dataset.users["user"][dataset.users["split"] == split]
        spans = [slice(*np.searchsorted(user, [id_, id_ + 1])) for id_ in ids]
        sets = [set(item[span]) for span in spans]
        for number, (window, last) in enumerate(zip(*_read_windows(file, dataset.padding), strict=True)):
            at = {id_: 1 + index for index, id_ in enumerate([*window[window != dataset.padding], last])}
            for span in (span for span, items in zip(spans, sets, strict=True) if items.issuperset(at)):
                order = np.array([at.get(id_, 0) for id_ in item[span]])
                if np.array_equal(time[span][order > 0], time[span][-len(at) :]):  # its last, equal times aside
                    place[span] = order
                    break
            else:
                raise UserError(f"{file}, row {number}: no {split} user ends so; use LLaRA's rows of MovieLens-100K")
    return replace(dataset, events=events.iloc[np.lexsort((place, time, user))].reset_index(drop=True))


_CORE = 4  # the fewest events of a user, and of an artist but for cut-off rows, in LLaRA's LastFM


def _read_hetrec(files: list[Path]) -> Dataset:
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
    items = _items(_unique_titles([titles[str(a)] for a in artists]), source_id=artists)
    dataset = _assemble(items, user, artist, table["time"].to_numpy(), source_users)
    return replace(dataset, notes=("histories are in order of first tagging; LLaRA's are in order of artist ids",))


# ---------------------------------------------------------------- LLaRA's files


class _Part:
    """Stands in for a pandas object while a pickle is read: keeps what it is given, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


_ADMITTED = {  # all that these files name, and nothing in it runs anything
    "builtins.slice": slice,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": _Part,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.int8),  # ndarray.__setstate__ fills it
    "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype)[0],
    "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(
        shape, order=order
    ),
    "pandas.core.frame.DataFrame": _Part,
    "pandas.core.indexes.base.Index": _Part,
    "pandas.core.indexes.base._new_Index": lambda _, state: _Part(state),
    "pandas.core.indexes.range.RangeIndex": _Part,
    "pandas.core.indexes.numeric.Int64Index": _Part,
    "pandas.core.internals.managers.BlockManager": _Part,
    "pandas._libs.internals._unpickle_block": _Part,
}


class _Unpickler(pickle.Unpickler):
    """Admits what a table of numbers and lists needs; refuses all else by name, before anything is called."""

    def find_class(self, module: str, name: str) -> object:
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if wanted not in _ADMITTED:
            raise UserError(f"calls {wanted}, which no table of numbers needs and which may run code")
        return _ADMITTED[wanted]


def _unpickle_table(file: Path) -> dict[str, list]:
    """The columns of a pickled DataFrame (pandas 1.3 to 2) as lists, read without pandas."""
    columns = {}
    try:
        with open(file, "rb") as handle:
            blocks, (names, *_) = _Unpickler(handle).load().state["_mgr"].arguments
        names = names.arguments[0]["data"]
        for values, where, *_ in (block.arguments for block in blocks):
            columns |= {str(name): list(row) for name, row in zip(names[where], values, strict=True)}
    except UserError as error:
        raise UserError(f"{file} {error}: use files from a source that you trust") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged or not a pickled DataFrame ({error}): fetch it again") from error
    return columns


def _read_windows(file: Path, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """History (n, window) with padding on the right and target (n,); of (item, rating) pairs the item."""
    columns = _unpickle_table(file)
    if not {"seq", "next"} <= columns.keys():
        raise UserError(f"{file} has columns {', '.join(columns)}, not seq and next: it is not one of LLaRA's files")
    try:
        history, target = np.array(columns["seq"], np.int64), np.array(columns["next"], np.int64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file}: seq and next are not item ids in lists of one length ({error}): fetch it again"
        ) from error
    if history.ndim == 3:
        history, target = history[..., 0], target[..., 0]
    wrong = ((history < 0) | (history > padding)).any(axis=1) | (target < 0) | (target >= padding)
    _refuse(
        file,
        wrong,
        lambda row: f"an item id is not among the {padding} titles beside it; use one release",
        0,
        "row",
    )
    return np.take_along_axis(history, np.argsort(history == padding, axis=1, kind="stable"), axis=1), target


def _read_id2name(file: Path) -> pd.DataFrame:
    """Lines id::title, ids 0..n-1 in order; HTML entities such as &amp; become characters."""
    titles = []
    for number, line in enumerate(_lines(file)):
        source_id, _, title = line.partition("::")
        if source_id != str(number) or not title.strip():
            raise UserError(f"{file}, line {number + 1}: not '{number}::title' but {line!r}; give each id one title")
        titles.append(html.unescape(title.strip()))
    return _items(_unique_titles(titles))


def _read_llara(files: list[Path]) -> Dataset:
    """LLaRA's splits: train windows that slide are joined to one history, other rows are a user each."""
    *splits, titles = files
    items = _read_u_item(titles) if titles.name == "u.item" else _read_id2name(titles)
    users, events, notes = [], [], ()
    for split, file in zip(SPLITS, splits, strict=True):
        user, item = _join_windows(*_read_windows(file, len(items)), len(items), slides=split == "train")
        events.append((user + len(users), item))
        users += [split] * (user.max(initial=-1) + 1)
        if split == "train" and file.name != "train_data.df":
            notes = (f"for want of train_data.df, train users are the {len(users)} of {file.name}",)
    user, item = (np.concatenate(parts) for parts in zip(*events, strict=True))
    time = _position(user, np.bincount(user, minlength=len(users)))  # the files have no times
    events = pd.DataFrame({"user": user, "item": item, "time": time})
    return Dataset(items, events, _users(users, range(len(users))), notes=notes)


def _join_windows(history: np.ndarray, target: np.ndarray, padding: int, slides: bool) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each event; a history that is the last row's plus its target continues that user."""
    n, window = history.shape
    length = (history != padding).sum(axis=1)
    grown = np.pad(history, ((0, 0), (0, 1)), constant_values=padding)
    grown[np.arange(n), length] = target
    grown = np.where((length == window)[:, None], grown[:, 1:], grown[:, :-1])
    begins = np.ones(n, dtype=bool)
    begins[1:] = not slides or (history[1:] != grown[:-1]).any(axis=1)
    fresh = np.pad((history != padding) & begins[:, None], ((0, 0), (0, 1)), constant_values=True)
    user = np.repeat(np.cumsum(begins) - 1, fresh.sum(axis=1))
    return user, np.column_stack([history, target])[fresh]


# ---------------------------------------------------------------- a user's own CSV files


def _refuse(
    file: Path, wrong: pd.Series | np.ndarray, say: Callable[[int], str], first: int = 2, word: str = "line"
) -> None:
    """Raise for the first row where `wrong`; `first` is the number of row 0 (2 after a header line)."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        more = f" ({len(rows)} such {word}s)" if len(rows) > 1 else ""
        raise UserError(f"{file}, {word} {rows[0] + first}: {say(rows[0])}{more}")


def _refuse_twice(file: Path, keys: pd.Series, say: Callable[[int, int], str]) -> None:
    """Raise for the first row with a key that an earlier row has; `say` is told row and the earlier line."""
    _refuse(file, keys.duplicated(), lambda row: say(row, np.flatnonzero(keys == keys[row])[0] + 2))


def _read_table(file: Path, columns: Sequence[str], types: type | dict) -> pd.DataFrame:
    try:
        table = pd.read_csv(
            file,
            dtype=types,
            encoding="utf-8-sig",
            keep_default_na=False,
            index_col=False,
            skipinitialspace=True,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a CSV file in UTF-8 ({str(error).strip()}): mend or export it again") from error
    for column in columns:
        if column not in table:
            raise UserError(f"{file} has no column {column!r} but {', '.join(table)}: name its columns in line 1")
    return table


def _read_csv(files: list[Path]) -> Dataset:
    """events.csv (user, item, time) and items.csv (id, title, and text if it is there)."""
    event_file, item_file = files
    items = _read_table(item_file, ("id", "title"), str)
    ids, titles = items["id"].str.strip(), items["title"].str.strip()
    _refuse(item_file, ids == "", lambda row: "the id is empty; give the item one")
    _refuse(item_file, titles == "", lambda row: f"the title of item {ids[row]!r} is empty; give it one")
    _refuse_twice(item_file, ids, lambda row, line: f"id {ids[row]!r} is on line {line} too; keep one of them")
    _refuse_twice(
        item_file,
        _same_title(titles),
        lambda row, line: (
            f"title {titles[row]!r} is on line {line} too (case and spaces do not count) and answers "
            "are told apart by title; make them differ, by a year for example"
        ),
    )
    events = _read_table(event_file, ("user", "item", "time"), {"user": str, "item": str})
    codes, names = pd.factorize(events["item"])  # as text: "01" and "1" are two items
    item = pd.Index(ids).get_indexer(names.str.strip())[codes]
    _refuse(event_file, events["user"] == "", lambda row: "the user is empty; name one or drop the line")
    _refuse(event_file, item < 0, lambda row: f"item {names[codes[row]]!r} is not in items.csv; add it")
    time = _parse_time(event_file, events["time"])
    user, source_users = pd.factorize(events["user"])  # in order of appearance
    return _assemble(_items(titles, items.get("text", ""), ids), user, item, time, source_users)


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
    _refuse(
        file,
        wrong,
        lambda row: (
            f"time {text[row]!r} is neither a whole number nor an ISO date; write it as 2024-05-31, as "
            "2024-05-31T18:00:00 or as seconds since 1970, all lines in one way"
        ),
    )
    return values.astype(np.int64).to_numpy()
