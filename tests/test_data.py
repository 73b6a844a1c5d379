"""The stored form of data sets, and their sequences and candidates."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ilora import data
from ilora.data import Sequences, candidates, load, load_dataset, sequences
from ilora.data.dataset import item_table, unique_titles, user_table
from ilora.data.windows import _GOLDEN, splitmix64
from ilora.errors import UserError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---------------------------------------------------------------- the one form


def test_world_is_stored_under_its_key_and_read_again(home):
    world = load(users=60, seed=3)
    folder = home / "data" / world.key
    assert {file.name for file in folder.iterdir()} >= {
        "items.csv",
        "events.csv",
        "users.csv",
        "dataset.json",
    }
    again = load_dataset(folder)
    for table in ("items", "events", "users"):
        pd.testing.assert_frame_equal(getattr(again, table), getattr(world, table))
    assert replace(again, items=0, events=0, users=0) == replace(world, items=0, events=0, users=0)
    assert load(users=60, seed=4).key != world.key == load(users=60, seed=3).key
    assert world.users["split"].value_counts().to_dict() == {"train": 48, "validation": 6, "test": 6}


def test_saving_leaves_an_equal_copy(tmp_path):
    world = load(users=40)
    world.save(tmp_path / "copy")
    pd.testing.assert_frame_equal(load_dataset(tmp_path / "copy").events, world.events)


def test_titles_that_look_like_missing_values_survive(tmp_path):
    titles = ["NA", "null", "1999", "None", 'quo"te, comma', *map(str, range(20))]
    world = load(users=40)
    items = item_table(titles)
    replace(world, items=items).save(tmp_path / "odd")
    assert list(load_dataset(tmp_path / "odd").items["title"]) == titles


@pytest.mark.parametrize(
    "written",
    ["Alien\nResurrection", " Alien \t Resurrection ", "Alien\u2028Resurrection", "Alien\r\n\r\nResurrection"],
)
def test_titles_and_texts_are_one_line(written):
    items = item_table([written, "Cafe\u0301"], [written, ""])
    assert list(items["title"]) == ["Alien Resurrection", "Caf\u00e9"]
    assert list(items["text"]) == ["Alien Resurrection", ""]


@pytest.mark.parametrize(
    ("titles", "unique"),
    [
        (["Alien", "Alien\n", "ALIEN"], ["Alien", "Alien (2)", "ALIEN (3)"]),
        (["Caf\u00e9", "Cafe\u0301"], ["Caf\u00e9", "Caf\u00e9 (2)"]),
        (["A (2)", "A", "A"], ["A (2)", "A", "A (2) (2)"]),
    ],
)
def test_titles_that_count_as_one_are_numbered(titles, unique):
    assert unique_titles(titles) == unique


def plays(folder, users=40, artists=30, events=30):
    """Random plays of four artists by each user, so that users return to what they played."""
    rng = np.random.default_rng(0)
    lines = [
        f"u{user},a{rng.choice([user % artists, (user + 1) % artists, 3, 4])},{n}"
        for user in range(users)
        for n in range(events)
    ]
    folder.mkdir()
    (folder / "items.csv").write_text("id,title\n" + "".join(f"a{n},Artist {n}\n" for n in range(artists)))
    (folder / "events.csv").write_text("\n".join(["user,item,time", *lines, lines[-1]]) + "\n")
    return str(folder)


def test_repeats_are_counted_and_dropped_on_request(tmp_path, caplog):
    folder = plays(tmp_path / "plays")
    kept = load("csv", folder)
    windows = [sequences(kept, split) for split in data.SPLITS]
    repeated = sum((part.history == part.target[:, None]).any(1).sum() for part in windows)
    total = sum(map(len, windows))
    assert kept.notes[0].startswith("2 of 1201 events have the time of another one")
    says = f"{repeated} of {total} targets ({repeated / total:.1%}) are among the 10 items before"
    assert kept.notes[-1].startswith(says)
    assert repeated / total > 0.8 and len(kept.notes) == 2 and kept.notes[-1] in caplog.text
    with pytest.raises(
        UserError, match=r"none of them in its .* split"
    ):  # with four artists each, few users have a target left
        load("csv", plays(tmp_path / "few", users=10, events=4), repeats="drop")
    dropped = load("csv", folder, repeats="drop")
    assert dropped.key != kept.key
    assert not dropped.events.duplicated(["user", "item"]).any()
    first = kept.events.drop_duplicates(["user", "item"])
    assert dropped.events.to_numpy().tolist() == first.to_numpy().tolist()
    assert dropped.notes == (f"repeats = 'drop' left out {1201 - len(first)} of 1201 events",)
    assert load("csv", folder).key == kept.key and len(load("csv", folder).events) == 1201
    with pytest.raises(UserError, match="repeats must be one of keep, drop, not 'no'"):
        load("csv", folder, repeats="no")


def test_equal_times_are_counted_and_keep_the_order_of_the_file(tmp_path):
    folder = tmp_path / "days"
    folder.mkdir()
    (folder / "items.csv").write_text("id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(30)))
    lines = [f"u{u},i{(7 * n + u) % 30},2024-01-0{1 + n // 4}\n" for u in range(12) for n in range(9)]
    (folder / "events.csv").write_text("user,item,time\n" + "".join(lines))
    dataset = load("csv", str(folder))
    assert dataset.notes == (
        "96 of 108 events have the time of another one of their user, which leaves their order open",
    )
    assert list(dataset.events["item"][:9]) == [7 * n % 30 for n in range(9)]


def small(histories: list[list[int]], splits: list[str], n_items: int = 40) -> data.Dataset:
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    time = np.concatenate([np.arange(len(history)) for history in histories])
    events = pd.DataFrame({"user": user, "item": np.concatenate(histories), "time": time})
    items = item_table([f"item {n}" for n in range(n_items)])
    return data.Dataset(items, events, user_table(splits, range(len(histories))))


def test_sequences_against_a_plain_loop():
    histories = [[1, 2, 3], [5, 6, 7, 8, 9], [4, 3, 2, 1, 0, 9], [7, 8, 9, 10]]
    dataset = small(histories, ["train", "train", "test", "train"])
    expected = [
        (
            user,
            at,
            [40] * max(0, 4 - at) + histories[user][max(0, at - 4) : at],
            min(at, 4),
            histories[user][at],
        )
        for user in (0, 1, 3)
        for at in range(3, len(histories[user]))
    ]
    rows = sequences(dataset, "train", window=4)
    assert [
        (u, p, list(h), n, t)
        for u, p, h, n, t in zip(rows.user, rows.position, rows.history, rows.length, rows.target, strict=True)
    ] == expected
    last = sequences(dataset, "train", window=4, windows="last")
    assert list(last.user) == [1, 3] and list(last.target) == [9, 10]
    assert list(rows.take(rows.user == 1).target) == [8, 9] and len(rows.take(slice(0, 0))) == 0


def test_sequences_refuse_an_unknown_split():
    with pytest.raises(UserError, match="choose split among"):
        sequences(small([[1, 2, 3, 4]], ["train"]), "valid")


# ---------------------------------------------------------------- candidates


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    n, length = 3000, rng.integers(3, 11, 3000)
    history = np.argsort(rng.random((n, 60)), axis=1)[:, :11]
    target = history[:, 10]
    history = np.where(np.arange(10) >= 10 - length[:, None], history[:, :10], 60)
    return Sequences(np.arange(n), length, history, length, target)


def test_candidates_contain_the_target_once_and_no_item_of_the_history(windows):
    offered = candidates(windows, 60, seed=1)
    assert offered.shape == (3000, 20) and offered.min() >= 0 and offered.max() < 60
    assert all(len(set(row)) == 20 for row in offered)
    assert ((offered == windows.target[:, None]).sum(1) == 1).all()
    assert not (offered[:, :, None] == windows.history[:, None]).any()


def test_candidates_depend_only_on_the_seed_and_the_row(windows):
    offered = candidates(windows, 60, seed=1)
    shuffled = np.random.default_rng(1).permutation(3000)
    assert (candidates(windows.take(shuffled), 60, seed=1) == offered[shuffled]).all()
    assert (candidates(windows.take([17]), 60, seed=1) == offered[17]).all()
    wide = replace(windows, history=np.pad(windows.history, ((0, 0), (5, 0)), constant_values=60))
    assert (candidates(wide, 60, seed=1) == offered).all()
    assert (candidates(windows, 60, seed=2) != offered).any(axis=1).mean() > 0.999


def test_candidates_are_uniform_over_items_and_the_target_over_columns(windows):
    offered = candidates(windows, 60, seed=5)
    column = np.bincount((offered == windows.target[:, None]).argmax(1), minlength=20)
    assert abs(column - 150).max() < 5 * np.sqrt(150)
    others = offered[offered != windows.target[:, None]]
    free = (~(windows.history[:, :, None] == np.arange(60)).any(1)) & (windows.target[:, None] != np.arange(60))
    expected = (19 * free / free.sum(1, keepdims=True)).sum(0)
    assert abs(np.bincount(others, minlength=60) - expected).max() < 5 * np.sqrt(expected.max())


def test_splitmix_agrees_with_published_values():
    state = np.full(1, 1234567, dtype=np.uint64)  # the reference sequence for seed 1234567
    expected = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    states = [state + np.array([n], np.uint64) * _GOLDEN for n in range(3)]
    assert tuple(int(splitmix64(state)[0]) for state in states) == expected


def test_too_few_items_for_candidates(windows):
    with pytest.raises(UserError, match="need 30 items, there are 25: add items or choose a window of at most 5"):
        candidates(replace(windows, history=np.minimum(windows.history, 25)), 25, seed=0)
