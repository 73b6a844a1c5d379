"""LLaRA's rows: pickled tables of windows and targets, as pandas 1.3 to 3 writes them, read without running code."""

import io
import itertools
import math
import pickletools
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import PickleError, Unpickler

import numpy as np
import pandas as pd

from ilora.data.dataset import SPLITS, Dataset, refuse_rows, user_table
from ilora.errors import UserError

_MOST = 10**9  # item ids in a file: a few bytes can refer to one long list many times
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError, PickleError)


def read_splits(files: list[Path], items: pd.DataFrame) -> Dataset:
    """The rows of the three splits' files as users; overlapping train windows are joined.  Raises UserError."""
    (train, window), *others = (read_rows(file, len(items)) for file in files)
    histories = []
    for *history, target in train:
        if not histories or history != histories[-1][-window:]:  # else it is the same user's next window
            histories.append(history)
        histories[-1].append(target)
    parts = [histories, *(rows for rows, _ in others)]
    split = np.repeat(SPLITS, [len(part) for part in parts])
    events = pd.Series([history for part in parts for history in part]).explode()
    events = pd.DataFrame({"user": events.index, "item": events.to_numpy(np.int64)})
    events["time"] = events.groupby("user").cumcount()  # the files have no times
    note = f"train_data.df is missing, so train users are the {len(parts[0])} of {files[0].name}"
    notes = () if files[0].name == "train_data.df" else (note,)
    return Dataset(items, events, user_table(split, range(len(split))), notes=notes)


def read_rows(file: Path, n_items: int) -> tuple[list[list[int]], int]:
    """Each row's history, without padding (`n_items`), and target in one list; and the window.  Raises UserError."""
    try:
        columns = _read_columns(file)
        history, target = columns["seq"], _item_ids(columns["next"])
        (window,) = set(map(len, history))
        if window * len(history) > _MOST:
            raise ValueError(f"{len(history)} lists of {window}")
        history = _item_ids(itertools.chain.from_iterable(history)).reshape(len(history), window)
    except UserError as error:
        raise UserError(f"{file} {error}: use files from a source that you trust") from error
    except _DAMAGE as error:
        form = "a DataFrame with item ids in seq, as lists of one length, and next, as int64"
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}) or not {form}: fetch it again") from error
    wrong = ((history < 0) | (history > n_items)).any(axis=1) | (target < 0) | (target >= n_items)
    message = f"an item id is not among the {n_items} titles in the folder; use the files of one release"
    refuse_rows(file, pd.Series(wrong), message, word="row")
    return [[item for item in row if item != n_items] for row in np.column_stack([history, target]).tolist()], window


def _item_ids(values: Iterable) -> np.ndarray:
    """int64 of whole numbers, or of the first of each (item, rating) pair.  Raises ValueError or TypeError."""
    values = [value[0] if isinstance(value, list | tuple) else value for value in values]
    if not all(isinstance(value, int | float) and value == int(value) for value in values):
        raise ValueError("not whole numbers")
    return np.array(values, np.int64)


def _read_columns(file: Path) -> dict[str, list]:
    """The columns `seq` and `next` (and those stored with them) of a pickled DataFrame, as lists."""
    content, columns = file.read_bytes(), {}
    for opcode, argument, _ in pickletools.genops(content):  # raises ValueError where sizes are false
        if "PUT" in opcode.name and int(argument) > len(content):  # would reserve memory up to this index
            raise ValueError(f"place {argument} in a memo")
    blocks, (names, *_) = _TableUnpickler(io.BytesIO(content)).load().state["_mgr"].arguments
    names = names.arguments[1]["data"]
    if isinstance(names, _StandIn) and len(names.state) != 5:  # pandas 3: strings of Arrow or, without pyarrow, NumPy
        names = names.state["_pa_array"] if isinstance(names.state, dict) else names.state[1]
    names = _to_list(names)
    for values, where, *_ in (block.arguments for block in blocks):
        if {"seq", "next"}.intersection(names[where]):  # other columns may be of any type
            columns |= dict(zip(names[where], _to_list(values), strict=True))
    return columns


class _StandIn:
    """Replaces an object of pandas or NumPy while a pickle is read: stores its arguments and state, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def _to_list(value: object) -> object:
    """Lists in place of an array's stand-in, or else the value.  Raises ValueError if shape and size differ."""
    if not isinstance(value, _StandIn):
        return value
    _, shape, dtype, fortran, data = value.state
    if not isinstance(data, list):
        return _numbers(data, dtype, shape, "F" if fortran else "C")
    if math.prod(shape) != len(data) or not data:  # a shape without values can claim any number of empty lists
        raise ValueError(f"{len(data)} values in shape {shape}")
    return np.fromiter(map(_to_list, data), object, len(data)).reshape(shape).tolist()


def _numbers(data: bytes, dtype: _StandIn, shape: tuple[int, ...], order: str) -> list:
    """The values of an array of plain numbers.  Raises ValueError for any other type."""
    code = dtype.state[1] + dtype.arguments[0]  # byte order and type, such as <i8
    if not data or not re.fullmatch("[<>=|][biuf][1248]", code):
        raise ValueError(f"{len(data)} bytes of type {code}")
    return np.frombuffer(data, code).reshape(shape, order=order).tolist()


def _texts(parts: tuple) -> list[str]:
    """The texts of an Arrow array: type, length, number of nulls, offset, (validity, ends, characters)."""
    kind, length, _, offset, (_, ends, characters), *_ = parts
    ends = np.frombuffer(ends, {"string": np.int32, "large_string": np.int64}[kind])[offset : offset + length + 1]
    return [bytes((characters or b"")[start:end]).decode() for start, end in itertools.pairwise(ends)]


_REPLACEMENTS = {  # nothing here runs anything that a file chooses
    "builtins.slice": slice,
    "_codecs.encode": lambda text, _: text.encode("latin-1"),  # bytes, in protocols 0 to 2
    "numpy.core.multiarray.scalar": lambda dtype, data: _numbers(data, dtype, (1,), "C")[0],
    "numpy.core.numeric._frombuffer": _numbers,
    "pyarrow.lib.type_for_alias": lambda name: name,
    "pyarrow.lib.py_buffer": lambda data: data,
    "pyarrow.lib._restore_array": _texts,
}


class _TableUnpickler(Unpickler):
    """Gives stand-ins for names of pandas and NumPy, and replacements; refuses all else before it is called."""

    def find_class(self, module: str, name: str) -> object:
        name = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        if name not in _REPLACEMENTS and not name.startswith(("pandas.", "numpy.")):
            raise UserError(f"calls {name}, which no table of numbers, lists and text needs and which may run code")
        return _REPLACEMENTS.get(name, _StandIn)
