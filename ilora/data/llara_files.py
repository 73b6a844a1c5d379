"""LLaRA's rows: pickled tables of windows and targets, read without running anything that a pickle may call.

Unpickling calls whatever a file names, so that a file from a stranger can run any program. Here every name that
pandas 1.3 to 3 writes for a table of numbers, lists and text gives a stand-in that only keeps what it is given, and
any other name is refused. Rows are joined to histories again where the windows of a user slide.
"""

import io
import itertools
import math
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np
import pandas as pd

from ilora.data.tables import SPLITS, Tables, refuse_rows, user_table
from ilora.errors import UserError


class _Part:
    """Stands in for an object of pandas or numpy while a pickle is read: keeps what it is given, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def _dtype(part: _Part) -> np.dtype:
    """A dtype of plain numbers; ValueError for any other."""
    code, order = part.arguments[0], part.state[1]
    if not re.fullmatch("[biuf][1248]", code):
        raise ValueError(f"values of type {code}")
    return np.dtype((order if order in "<>" else "") + code)


def _plain(value: object) -> object:
    """Lists in the place of an array's stand-in, else the value.  Raises ValueError if shape and size differ."""
    if not isinstance(value, _Part):
        return value
    _, shape, dtype, fortran, data = value.state
    if not isinstance(data, list):
        return _numbers(data, dtype, shape, "F" if fortran else "C")
    if math.prod(shape) != len(data):
        raise ValueError(f"{len(data)} values in shape {shape}")
    data = [_plain(each) for each in data]
    return data if len(shape) == 1 else [data[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]


def _numbers(data: bytes, dtype: _Part, shape: tuple[int, ...], order: str) -> list:
    return np.frombuffer(data, _dtype(dtype)).reshape(shape, order=order).tolist()


def _texts(parts: tuple) -> list[str]:
    """The texts of an Arrow array: type, length, number of nulls, offset, (validity, ends, characters)."""
    kind, length, _, offset, (_, ends, characters), *_ = parts
    ends = np.frombuffer(ends, {"string": np.int32, "large_string": np.int64}[kind])[offset : offset + length + 1]
    return [bytes((characters or b"")[start:end]).decode() for start, end in itertools.pairwise(ends)]


_ADMITTED = {  # all that such files name, and nothing in it runs anything
    "builtins.slice": slice,
    "_codecs.encode": lambda text, _: text.encode("latin-1"),  # bytes, in protocols 0 to 2
    "numpy.dtype": _Part,
    "numpy.ndarray": _Part,
    "numpy.core.multiarray._reconstruct": _Part,
    "numpy.core.multiarray.scalar": lambda dtype, data: _numbers(data, dtype, (1,), "C")[0],
    "numpy.core.numeric._frombuffer": _numbers,
    "pandas.core.frame.DataFrame": _Part,
    "pandas.core.indexes.base.Index": _Part,
    "pandas.core.indexes.base._new_Index": lambda _, state: _Part(state),
    "pandas.core.indexes.range.RangeIndex": _Part,
    "pandas.core.indexes.numeric.Int64Index": _Part,
    "pandas.core.internals.managers.BlockManager": _Part,
    "pandas._libs.internals._unpickle_block": _Part,
    **dict.fromkeys(
        ("pandas.DataFrame", "pandas.Index", "pandas.RangeIndex", "pandas.StringDtype", "pandas.NA"), _Part
    ),
    "pandas.core.arrays.string_.StringDtype": _Part,
    "pandas.core.arrays.string_.StringArray": _Part,
    "pandas.core.arrays.string_arrow.ArrowStringArray": _Part,
    "pandas.arrays.StringArray": _Part,
    "pandas.arrays.ArrowStringArray": _Part,
    "pandas._libs.arrays.__pyx_unpickle_NDArrayBacked": _Part,
    "pandas._libs.missing.C_NAType": _Part,
    "pyarrow.lib.type_for_alias": lambda name: name,
    "pyarrow.lib.py_buffer": lambda data: data,
    "pyarrow.lib._restore_array": _texts,
}


class _Unpickler(pickle.Unpickler):
    """Admits what a table of numbers, lists and text needs; refuses all else by name, before anything is called."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("__builtin__", "builtins")  # as protocols 0 to 2 call it
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if wanted not in _ADMITTED:
            raise UserError(f"calls {wanted}, which no table of numbers, lists and text needs and which may run code")
        return _ADMITTED[wanted]


def _unpickle(content: bytes) -> object:
    for opcode, argument, _ in pickletools.genops(content):  # which raises ValueError where sizes are false
        if "PUT" in opcode.name and int(argument) > len(content):  # would reserve memory up to this place
            raise ValueError(f"place {argument} in a memo")
    return _Unpickler(io.BytesIO(content)).load()


def _column_names(data: object) -> list[str]:
    """The names in an Index; pandas 3 keeps them as Arrow strings or, without pyarrow, in an array of numpy's."""
    if not isinstance(data, _Part) or len(data.state) == 5:
        return _plain(data)
    return data.state["_pa_array"] if isinstance(data.state, dict) else _plain(data.state[1])


def _read_table(file: Path, wanted: tuple[str, ...] = ("seq", "next")) -> dict[str, list]:
    """Those of the wanted columns that a pickled DataFrame (pandas 1.3 to 3) has, as lists.

    Raises UserError if the file is damaged, is no DataFrame or names what a DataFrame does not need.
    """
    columns = {}
    try:
        blocks, (names, *_) = _unpickle(file.read_bytes()).state["_mgr"].arguments
        names = _column_names(names.arguments[0]["data"])
        for values, where, *_ in (block.arguments for block in blocks):
            inside = names[where]
            if set(wanted).intersection(inside):  # other columns may be of any kind
                columns |= dict(zip(inside, _plain(values), strict=True))
    except UserError as error:
        remedy = "use files from a source that you trust, or save seq, len_seq and next alone, as lists and int64"
        raise UserError(f"{file} {error}: {remedy}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise UserError(f"{file} is damaged or not a pickled DataFrame ({error}): fetch it again") from error
    if not set(wanted) <= columns.keys():
        raise UserError(
            f"{file} has columns {', '.join(map(str, names))}, not seq and next: it is not one of LLaRA's files"
        )
    return columns


_MOST = 10**9  # item ids in a file; a few bytes can claim more


def _item_ids(values: list) -> np.ndarray:
    """int64 of whole numbers, or of the first of each (item, rating) pair.  Raises ValueError or TypeError."""
    values = [value[0] if isinstance(value, list | tuple) else value for value in values]
    if not all(isinstance(value, int | float) and value == int(value) for value in values):
        raise ValueError("not whole numbers")
    return np.array(values, np.int64)


def read_windows(file: Path, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """History (n, window) with padding on the right and target (n,); of (item, rating) pairs the item.

    `padding` is the number of items. Raises UserError naming file, row and remedy.
    """
    columns = _read_table(file)
    try:
        rows, target = columns["seq"], _item_ids(columns["next"])
        (width,) = set(map(len, rows))
        if width * len(rows) > _MOST:
            raise ValueError(f"{len(rows)} lists of {width}")
        history = _item_ids([item for row in rows for item in row]).reshape(len(rows), width)
    except (TypeError, ValueError, OverflowError, LookupError) as error:
        what = f"{file}: seq and next are not item ids in lists of one length ({error})"
        raise UserError(f"{what}: fetch it again") from error
    wrong = ((history < 0) | (history > padding)).any(axis=1) | (target < 0) | (target >= padding)
    says = f"an item id is not among the {padding} titles in the folder; use the files of one release"
    refuse_rows(file, pd.Series(wrong), lambda _: says, word="row")
    return np.take_along_axis(history, np.argsort(history == padding, axis=1, kind="stable"), axis=1), target


def read_splits(files: list[Path], items: pd.DataFrame) -> Tables:
    """The rows of the three splits' files; `items` are those that the rows' ids count through.

    Train windows that slide are joined to one history, other rows are a user each. Raises UserError.
    """
    users, events, notes = [], [], ()  # users: the split of each
    for split, file in zip(SPLITS, files, strict=True):
        user, item = _join_windows(*read_windows(file, len(items)), len(items), slides=split == "train")
        events.append((user + len(users), item))
        users += [split] * (user.max(initial=-1) + 1)
        if split == "train" and file.name != "train_data.df":
            notes = (f"train_data.df is missing, so train users are the {len(users)} of {file.name}",)
    user, item = (np.concatenate(parts) for parts in zip(*events, strict=True))
    events = pd.DataFrame({"user": user, "item": item})
    events["time"] = events.groupby("user").cumcount()  # the files have no times
    return Tables(items, events, user_table(users, range(len(users))), notes)


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
