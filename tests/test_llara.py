"""LLaRA's files in small: windows become histories, and what a pickle may not call is refused."""

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ilora.data import llara_files, load, sequences
from ilora.errors import UserError


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
    with open(file, "wb") as handle:
        Pickler(handle, 5).dump(old_frame(seq, target, extra))


def old_frame(seq: list, target: list, extra: object = None) -> PandasPart:
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
    return PandasPart("pandas.core.frame", "DataFrame", (), {"_mgr": manager})


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


@pytest.mark.parametrize("call", ["builtins.eval", "builtins.getattr", "pyarrow.load", "pandasx.y", "os.system"])
def test_every_other_global_is_refused(tmp_path, call):
    module, name = call.rsplit(".", 1)
    file = tmp_path / "bad.df"
    file.write_bytes(f"c{module}\n{name}\n(S'1'\ntR.".encode())
    with pytest.raises(UserError, match=f"bad.df calls {call}, .* use files from a source that you trust"):
        llara_files.read_rows(file, 30)


# ---------------------------------------------------------------- files that pandas writes today


NOT_ITEMS = r"rows.df is damaged .* or not a DataFrame with item ids in seq, as lists of one length"
ROWS = pd.DataFrame({"seq": [[1, 2, 3, 30], [4, 5, 6, 7], [2, 3, 30, 30]], "len_seq": [3, 4, 2], "next": [4, 5, 6]})


@pytest.mark.parametrize(
    "frame",
    [
        ROWS,
        ROWS.assign(title=["a", "b", "c"]),
        ROWS.assign(title=pd.array(["a", "b", None], dtype=pd.StringDtype("python"))),
        ROWS.assign(title=pd.Series(["a", "b", "c"], dtype=object), share=0.5, new=True),
        ROWS.set_index(pd.Index(["x", "y", "z"])),
        ROWS.set_index(pd.Index([7, 8, 9])),
        ROWS.assign(day=pd.Categorical([1, 2, 3]), year=pd.array([1, 2, None], dtype="Int64")),
        pd.concat([ROWS, ROWS]).iloc[::2].iloc[:3].assign(seq=ROWS["seq"].tolist(), next=[4, 5, 6]),
        ROWS.astype({"next": "int16"}),
        ROWS.astype({"next": float}),
        ROWS.astype({"next": ">i8"}),
        ROWS.assign(seq=[np.array(row) for row in ROWS["seq"]]),
        ROWS.assign(seq=[[np.int64(item) for item in row] for row in ROWS["seq"]]),
        ROWS.assign(seq=[[(item, 5) for item in row] for row in ROWS["seq"]], next=[(4, 1), (5, 2), (6, 3)]),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pandas_pickles_today_is_read(tmp_path, frame, protocol):
    frame.to_pickle(tmp_path / "rows.df", protocol=protocol)
    assert llara_files.read_rows(tmp_path / "rows.df", 30) == ([[1, 2, 3, 4], [4, 5, 6, 7, 5], [2, 3, 6]], 4)


def test_column_names_in_arrow_strings_are_read(tmp_path):
    """As pandas 3 writes them where pyarrow is installed, which the tests must not need."""
    ends = np.array([0, 0, 3, 10, 14]).tobytes()  # of five texts, the first of which an offset skips
    kind = PandasPart("pyarrow.lib", "type_for_alias", ("large_string",))
    buffers = [None, *(PandasPart("pyarrow.lib", "py_buffer", (data,)) for data in (ends, b"seqlen_seqnext"))]
    array = PandasPart("pyarrow.lib", "_restore_array", ((kind, 3, 0, 1, buffers, [], None),))
    names = PandasPart("pandas.arrays", "ArrowStringArray", (), {"_pa_array": array, "_dtype": None})
    frame = old_frame(ROWS["seq"].tolist(), [4, 5, 6])
    _, axes = frame.state["_mgr"].arguments
    axes[0].arguments[1]["data"] = names
    with open(tmp_path / "rows.df", "wb") as handle:
        Pickler(handle, 5).dump(frame)
    assert llara_files.read_rows(tmp_path / "rows.df", 30) == ([[1, 2, 3, 4], [4, 5, 6, 7, 5], [2, 3, 6]], 4)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (ROWS.astype({"next": "Int64"}), NOT_ITEMS + ", and next, as int64: fetch it again"),
        (ROWS.rename(columns={"seq": "items"}), NOT_ITEMS),
        (ROWS.assign(next=[4, 5.5, 6]), r"not whole numbers"),
        (ROWS.assign(next=[4, 5, float("nan")]), r"NaN"),
        (ROWS.assign(next=["4", "5", "6"]), r"rows.df is damaged|not whole numbers"),
        (
            ROWS.assign(seq=[1, 2, 3]),
            NOT_ITEMS,
        ),
        (
            ROWS.assign(seq=[[1], [1, 2], [1]]),
            NOT_ITEMS,
        ),
        (ROWS[:0], r"rows.df.*fetch it again"),
    ],
)
def test_other_tables_are_refused(tmp_path, frame, says):
    frame.to_pickle(tmp_path / "rows.df")
    with pytest.raises(UserError, match=says):
        llara_files.read_rows(tmp_path / "rows.df", 30)


class Call:
    """Pickles as a call of an admitted name with any arguments, and a state."""

    def __init__(self, name: str, *arguments: object, state: object = None):
        self.parts = Name(*name.rsplit(".", 1)), arguments, state

    def __reduce__(self):
        return self.parts


def array(shape: tuple, code: str, data: object) -> Call:
    dtype = Call("numpy.dtype", code, False, True, state=(3, "<", None, None, None, -1, -1, 0))
    start = Name("numpy", "ndarray"), (0,), b"b"
    return Call("numpy.core.multiarray._reconstruct", *start, state=(1, shape, dtype, False, data))


HARM = [
    Call("builtins.slice", Malicious("touch harm")),
    Call("numpy.dtype", Call("builtins.getattr", Name("os", "system"), "__call__")),
    Call("pandas._libs.internals._unpickle_block", Call("builtins.eval", "1"), 0, 2),
    Call("pandas._libs.arrays.__pyx_unpickle_NDArrayBacked", Name("subprocess", "Popen"), 0, None),
    Call("pandas.core.indexes.base._new_Index", Name("os", "system"), {"command": "touch harm"}),
    Call("pyarrow.lib.type_for_alias", Name("builtins", "exec")),
    Call("operator.attrgetter", "system"),
]
STORED = [
    Call("pandas.eval", "__import__('os').system('touch harm')", "python"),
    Call("pandas.core.frame.DataFrame.to_csv", ROWS, "harm"),
    Call("numpy.save", "harm", 1),
    Call("numpy.core.multiarray._reconstruct.__globals__", "1"),
]
LIES = [
    array((10**12,), "O8", [1]),
    array((10**12,), "i8", b"12345678"),
    array((2, -5), "O8", [1] * 10),
    array((2,), "O8", [1, 2, 3]),
    array((10**7, 0), "O8", []),
    array((10**7, 0), "i8", b""),
    array((1,), "V1000000000", b"x"),
    array((1,), "i8", [2]),
    Call("numpy.core.numeric._frombuffer", b"12345678", array((1,), "i8", b""), (10**12,), "C"),
    Call("pyarrow.lib._restore_array", ("large_string", 10**12, 0, 0, [None, b"12345678", b"x"])),
    Call("pyarrow.lib._restore_array", ("int64", 1, 0, 0, [None, b"12345678", b"x"])),
]


def with_element(file: Path, element: object) -> None:
    with open(file, "wb") as handle:
        Pickler(handle, 5).dump(old_frame([[1, 2, 3, 4], [5, 6, 7, 8]], [1, 2], element))


@pytest.mark.parametrize("element", HARM, ids=lambda element: str(element.parts[0].name))
def test_an_admitted_name_runs_nothing(tmp_path, monkeypatch, element):
    monkeypatch.chdir(tmp_path)
    with_element(tmp_path / "bad.df", element)
    with pytest.raises(UserError, match=r"bad.df calls .* may run code: use files from a source that you trust"):
        llara_files.read_rows(tmp_path / "bad.df", 30)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("element", STORED, ids=lambda element: str(element.parts[0].name))
def test_a_name_of_pandas_or_numpy_runs_nothing_either(tmp_path, monkeypatch, element):
    monkeypatch.chdir(tmp_path)
    with_element(tmp_path / "bad.df", element)
    with pytest.raises(UserError, match=r"bad.df is damaged"):
        llara_files.read_rows(tmp_path / "bad.df", 30)
    assert not list(tmp_path.glob("harm*"))


@pytest.mark.parametrize("element", LIES)
def test_sizes_that_are_not_true_are_refused_without_the_memory(tmp_path, element):
    with_element(tmp_path / "bad.df", element)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bad.df"):
        llara_files.read_rows(tmp_path / "bad.df", 30)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05K\x01r\xff\xff\xff\x3f.",  # a memo of 2**30 places
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",  # a bytearray of 1 TiB
        b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b"x.",  # bytes of 1 TiB
        b"\x80\x05\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1.",  # a whole number of 2 GiB
        b"",
        b"no pickle",
    ],
)
def test_a_few_bytes_cannot_claim_much_memory(tmp_path, content):
    (tmp_path / "bad.df").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bad.df is damaged .* or not a DataFrame"):
        llara_files.read_rows(tmp_path / "bad.df", 30)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_rows_that_share_one_long_list_cannot_claim_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(llara_files, "_MOST", 1000)
    write_frame(tmp_path / "bad.df", [[1] * 200] * 6, [1] * 6)
    with pytest.raises(UserError, match=r"6 lists of 200"):
        llara_files.read_rows(tmp_path / "bad.df", 30)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: (f / "Val_data.df").write_bytes((f / "Val_data.df").read_bytes()[:200]),
            "Val_data.df is damaged",
        ),
        (
            lambda f: (f / "Val_data.df").write_bytes(pickle.dumps([1, 2])),
            r"Val_data.df is damaged .* or not a DataFrame",
        ),
        (lambda f: (f / "Val_data.df").unlink(), "Val_data.df is missing: put it there"),
        (lambda f: (f / "train_data.df").unlink(), "train_data.df is missing"),
        (lambda f: (f / "id2name.txt").unlink(), "id2name.txt is missing"),
        (
            lambda f: write_frame(f / "Val_data.df", [[1, 2, 3, 4]], [30]),
            "Val_data.df, row 0: an item id is not among",
        ),
        (
            lambda f: write_frame(f / "Val_data.df", [[1, 2, 3, 4], [1]], [3, 3]),
            r"Val_data.df is damaged .* or not a DataFrame with item ids in seq, as lists of one length",
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
