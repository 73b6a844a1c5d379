"""LLaRA's rows: pickled tables of windows and targets, read without running anything that a pickle may call.

Unpickling calls whatever a file names, so that a file from a stranger can run any program. Here a file that names
anything but the parts of a table is refused. Rows are joined to histories again where the windows of a user slide.
"""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd

from ilora.runs import UserError
from ilora.tables import SPLITS, Tables, refuse_rows, user_table


class _Part:
    """Stands in for a pandas object while a pickle is read: keeps what it is given, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


_ADMITTED = {  # all that these files name, and nothing in it runs anything
    "builtins.slice": slice,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": _Part,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.int8),  # ndarray.__setstate__ fills it
    "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype)[0],
    "numpy.core.numeric._frombuffer": _array,
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


def _read_table(file: Path) -> dict[str, list]:
    """The columns of a pickled DataFrame (pandas 1.3 to 2) as lists.

    Raises UserError if the file is damaged, is no DataFrame or names what a DataFrame does not need.
    """
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


def read_windows(file: Path, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """History (n, window) with padding on the right and target (n,); of (item, rating) pairs the item.

    `padding` is the number of items. Raises UserError naming file, row and remedy.
    """
    columns = _read_table(file)
    if not {"seq", "next"} <= columns.keys():
        raise UserError(f"{file} has columns {', '.join(columns)}, not seq and next: it is not one of LLaRA's files")
    try:
        history, target = np.array(columns["seq"], np.int64), np.array(columns["next"], np.int64)
    except (TypeError, ValueError) as error:
        what = f"{file}: seq and next are not item ids in lists of one length ({error})"
        raise UserError(f"{what}: fetch it again") from error
    if history.ndim == 3:
        history, target = history[..., 0], target[..., 0]
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
            notes = (f"for want of train_data.df, train users are the {len(users)} of {file.name}",)
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
