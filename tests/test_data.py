"""The stored form, sequences and candidates."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ilora import data
from ilora.data import Sequences, candidates, load, load_dataset, sequences
from ilora.runs import UserError
from ilora.tables import item_table, user_table


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
    titles = ["NA", "null", "1999", " spaced", "None", 'quo"te, comma', *map(str, range(20))]
    world = load(users=40)
    items = item_table(titles)
    replace(world, items=items).save(tmp_path / "odd")
    assert list(load_dataset(tmp_path / "odd").items["title"]) == titles


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
    found = sequences(dataset, "train", window=4)
    assert [
        (u, p, list(h), n, t)
        for u, p, h, n, t in zip(found.user, found.position, found.history, found.length, found.target, strict=True)
    ] == expected
    last = sequences(dataset, "train", window=4, windows="last")
    assert list(last.user) == [1, 3] and list(last.target) == [9, 10]
    assert list(found.take(found.user == 1).target) == [8, 9] and len(found.take(slice(0, 0))) == 0


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


def test_candidates_hold_the_target_once_and_nothing_of_the_history(windows):
    chosen = candidates(windows, 60, seed=1)
    assert chosen.shape == (3000, 20) and chosen.min() >= 0 and chosen.max() < 60
    assert all(len(set(row)) == 20 for row in chosen)
    assert ((chosen == windows.target[:, None]).sum(1) == 1).all()
    assert not (chosen[:, :, None] == windows.history[:, None]).any()


def test_candidates_depend_on_seed_and_content_alone(windows):
    chosen = candidates(windows, 60, seed=1)
    shuffled = np.random.default_rng(1).permutation(3000)
    assert (candidates(windows.take(shuffled), 60, seed=1) == chosen[shuffled]).all()
    assert (candidates(windows.take([17]), 60, seed=1) == chosen[17]).all()
    wide = replace(windows, history=np.pad(windows.history, ((0, 0), (5, 0)), constant_values=60))
    assert (candidates(wide, 60, seed=1) == chosen).all()
    assert (candidates(windows, 60, seed=2) != chosen).any(axis=1).mean() > 0.999


def test_candidates_are_uniform_in_place_and_item(windows):
    chosen = candidates(windows, 60, seed=5)
    place = np.bincount((chosen == windows.target[:, None]).argmax(1), minlength=20)
    assert abs(place - 150).max() < 5 * np.sqrt(150)
    others = chosen[chosen != windows.target[:, None]]
    free = (~(windows.history[:, :, None] == np.arange(60)).any(1)) & (windows.target[:, None] != np.arange(60))
    expected = (19 * free / free.sum(1, keepdims=True)).sum(0)
    assert abs(np.bincount(others, minlength=60) - expected).max() < 5 * np.sqrt(expected.max())


def test_splitmix_agrees_with_published_values():
    state = np.full(1, 1234567, dtype=np.uint64)  # the reference sequence for seed 1234567
    expected = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    states = [state + np.array([n], np.uint64) * data._GOLDEN for n in range(3)]
    assert tuple(int(data._mix(state)[0]) for state in states) == expected


def test_too_few_items_for_candidates(windows):
    with pytest.raises(UserError, match="need 30 items, there are 25: add items or choose a window of at most 5"):
        candidates(replace(windows, history=np.minimum(windows.history, 25)), 25, seed=0)
