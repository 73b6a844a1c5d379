"""LLaRA's files in small: windows become histories, and what a pickle may not call is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ilora import llara
from ilora.data import load, sequences
from ilora.runs import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---------------------------------------------------------------- LLaRA's files in small


class Malicious:
    """Pickles as a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class PandasPart:
    """Pickles under the names of an old pandas, which the tests must not need."""

    def __init__(self, module: str, name: str, arguments: tuple, state: object = None):
        self.module, self.name, self.arguments, self.state = module, name, arguments, state

    def __reduce__(self):
        return Name(self.module, self.name), self.arguments, self.state


class Name:
    """A global that pickles by name without being importable."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("never called")


class Pickler(pickle._Pickler):  # the Python one, to write globals by name
    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
            return
        super().save(value, save_persistent_id)


def write_frame(file: Path, seq: list, target: list, extra: object = None) -> None:
    """A pickle shaped like LLaRA's: a DataFrame of pandas 1.x with columns seq, len_seq and next."""
    managers, base = "pandas.core.internals.managers", "pandas.core.indexes.base"
    seqs = np.empty((1, len(seq)), dtype=object)
    seqs[0, :] = [*seq] if extra is None else [*seq[:-1], extra]
    numbers = np.array([[len(row) for row in seq], target])

    def block(values, start, stop):
        return PandasPart("pandas._libs.internals", "_unpickle_block", (values, slice(start, stop, 1), 2))

    columns = {"data": np.array(["seq", "len_seq", "next"], dtype=object), "name": None}
    axes = [
        PandasPart(base, "_new_Index", (Name(base, "Index"), columns)),
        PandasPart(base, "_new_Index", (Name("pandas.core.indexes.range", "RangeIndex"), {"start": 0})),
    ]
    manager = PandasPart(managers, "BlockManager", ((block(seqs, 0, 1), block(numbers, 1, 3)), axes))
    frame = PandasPart("pandas.core.frame", "DataFrame", (), {"_mgr": manager})
    with open(file, "wb") as handle:
        Pickler(handle, 5).dump(frame)


def llara_folder(folder: Path, train="train_data.df", extra=None) -> Path:
    """Two train users by sliding windows (width 4, padding 30), two rows each of validation and test."""
    folder.mkdir()
    titles = ["Tom &amp; Jerry", "Fortify", "FORTIFY", *(f"Game {n}" for n in range(3, 30))]
    (folder / "id2name.txt").write_text("".join(f"{n}::{title}\n" for n, title in enumerate(titles)))
    windows, targets = [], []
    for history in ([3, 1, 4, 15, 9, 2], [6, 5, 3, 7, 8]):
        for at, target in enumerate(history):
            windows.append(history[max(0, at - 4) : at] + [30] * max(0, 4 - at))
            targets.append(target)
    write_frame(folder / train, windows, targets)
    write_frame(folder / "Val_data.df", [[1, 2, 3, 30], [2, 3, 30, 30]], [4, 5])
    write_frame(folder / "Test_data.df", [[5, 6, 7, 8], [9, 8, 7, 30]], [1, 2], extra)
    return folder


def test_llara_windows_are_joined_to_histories(tmp_path):
    dataset = load("llara", str(llara_folder(tmp_path / "steam")))
    assert list(dataset.users["split"]) == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert [list(group) for _, group in dataset.events.groupby("user")["item"]] == [
        *([3, 1, 4, 15, 9, 2], [6, 5, 3, 7, 8], [1, 2, 3, 4], [2, 3, 5], [5, 6, 7, 8, 1], [9, 8, 7, 2]),
    ]
    assert list(dataset.items["title"][:3]) == ["Tom & Jerry", "Fortify", "FORTIFY (2)"]
    assert len(sequences(dataset, "validation", windows="last")) == 1  # two items of history are too few


def test_a_train_sample_stands_in_and_says_so(tmp_path, caplog):
    dataset = load("steam", str(llara_folder(tmp_path / "steam", train="train_sample.df").parent))
    assert dataset.notes == ("train_data.df is missing, so train users are the 2 of train_sample.df",)
    assert dataset.notes[0] in caplog.text and (dataset.noun, dataset.verb) == ("game", "played")


def test_a_malicious_pickle_is_refused_by_the_name_of_what_it_calls(tmp_path):
    folder = llara_folder(tmp_path / "bad", extra=Malicious(f"touch {tmp_path / 'harm'}"))
    with pytest.raises(UserError, match=rf"Test_data.df calls {os.system.__module__}.system, .* may run code"):
        load("llara", str(folder))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("call", ["builtins.eval", "builtins.getattr", "numpy.load", "pandas.read_pickle", "os.system"])
def test_every_other_global_is_refused(tmp_path, call):
    module, name = call.rsplit(".", 1)
    file = tmp_path / "bad.df"
    file.write_bytes(f"c{module}\n{name}\n(S'1'\ntR.".encode())
    with pytest.raises(UserError, match=f"bad.df calls {call}, .* use files from a source that you trust"):
        llara._read_table(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: (f / "Val_data.df").write_bytes((f / "Val_data.df").read_bytes()[:200]),
            "Val_data.df is damaged",
        ),
        (
            lambda f: (f / "Val_data.df").write_bytes(pickle.dumps([1, 2])),
            "Val_data.df is damaged or not a pickled",
        ),
        (lambda f: (f / "Val_data.df").unlink(), "Val_data.df is missing: put it there"),
        (lambda f: (f / "train_data.df").unlink(), "train_data.df is missing"),
        (lambda f: (f / "id2name.txt").unlink(), "u.item is missing"),
        (
            lambda f: write_frame(f / "Val_data.df", [[1, 2, 3, 4]], [30]),
            "Val_data.df, row 0: an item id is not among",
        ),
        (
            lambda f: write_frame(f / "Val_data.df", [[1, 2, 3, 4], [1]], [3, 3]),
            "Val_data.df: seq and next are not",
        ),
        (
            lambda f: (f / "id2name.txt").write_text("0::A\n2::B\n"),
            "id2name.txt, line 2: not '1::title' but '2::B'",
        ),
        (lambda f: (f / "id2name.txt").write_text("0::A\n1::\n"), "id2name.txt, line 2: not '1::title'"),
    ],
)
def test_bad_llara_files(tmp_path, change, says):
    folder = llara_folder(tmp_path / "llara")
    change(folder)
    with pytest.raises(UserError, match=says):
        load("llara", str(folder))
