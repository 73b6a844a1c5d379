import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from ilora import runs, training
from ilora.data import Dataset, candidates, sequences
from ilora.recommenders import Pieces, Popularity, SASRec, expected_hit_ratio, hit_ratios

ITEMS = 40


def dataset(users=40):
    """A world with one law, item i is followed by i + 7; each user starts at an item of their own."""
    splits = ["train"] * (users - 8) + ["validation"] * 4 + ["test"] * 4
    lengths = 6 + np.arange(users) % 20
    user = np.repeat(np.arange(users), lengths)
    time = np.concatenate([np.arange(length) for length in lengths])
    events = pd.DataFrame({"user": user, "item": (3 * user + 7 * time) % ITEMS, "time": time})
    items = pd.DataFrame({"id": range(ITEMS), "title": [f"item {i}" for i in range(ITEMS)], "text": ""})
    people = pd.DataFrame({"user": range(users), "split": splits})
    return Dataset(name="law", key="law", items=items, events=events, users=people)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SASRec(ITEMS, dim=8, window=6).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def histories(rows, length, window=6):
    history = torch.full((rows, window), ITEMS)
    history[:, window - length :] = torch.randint(ITEMS, (rows, length), generator=torch.Generator().manual_seed(1))
    return history


# ---------------------------------------------------------------- SASRec


def test_padding_is_never_attended_to(model):
    history = histories(5, length=4)
    before = model.encode(history)
    with torch.no_grad():
        model.items.weight[ITEMS] += 100
    torch.testing.assert_close(model.encode(history), before, rtol=0, atol=0)
    torch.testing.assert_close(model.encode(history[:, 2:]), before)  # the same history without its padding
    assert torch.isfinite(model.states(torch.full((1, 6), ITEMS))).all()


def test_a_state_knows_only_what_came_before(model):
    history = histories(5, length=6)
    other = history.clone()
    other[:, 4] = (other[:, 4] + 1) % ITEMS
    before, after = model.states(history), model.states(other)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax(-1).min() > 1e-3


def test_rows_of_a_batch_do_not_meet(model):
    history = histories(5, length=5)
    torch.testing.assert_close(model.encode(history)[3], model.encode(history[3:4])[0])


def test_scores_are_those_of_the_whole_catalogue(model):
    history, offered = histories(5, length=3), torch.randint(ITEMS, (5, 20))
    every = model.encode(history) @ model.item_embeddings.T
    assert every.shape == (5, ITEMS)
    torch.testing.assert_close(
        model.score(history, offered), torch.stack([s[c] for s, c in zip(every, offered, strict=True)])
    )


def test_loss_is_the_cross_entropy_of_each_next_item(model):
    batch = torch.cat([histories(2, length=6), torch.tensor([[3], [4]])], dim=1)
    batch[0, :4] = ITEMS  # padding is no target, and the first item is the target of nothing
    terms = []
    for row, place in itertools.product(range(2), range(6)):
        if batch[row, place] != ITEMS:
            state = model.states(batch[row : row + 1, :6])[0, place]
            terms.append(functional.cross_entropy(state @ model.item_embeddings.T, batch[row, place + 1]))
    assert len(terms) == 2 + 6
    torch.testing.assert_close(model(batch), sum(terms) / 12)


def test_a_history_longer_than_the_window_is_refused(model):
    with pytest.raises(ValueError, match="7 items is longer than the window of 6"):
        model.encode(torch.zeros(1, 7, dtype=torch.long))


# ---------------------------------------------------------------- files


def test_saved_models_come_back(tmp_path, model):
    popularity = Popularity.from_dataset(dataset())
    for saved in (model, popularity):
        saved.save_pretrained(tmp_path)
        loaded = type(saved).from_pretrained(tmp_path)
        history = histories(3, length=4)
        torch.testing.assert_close(loaded.score_all(history), saved.score_all(history), rtol=0, atol=0)
        assert not loaded.training


def test_what_is_not_a_saved_model_is_refused(tmp_path, model):
    with pytest.raises(runs.UserError, match=r"cannot read a SASRec.*No such file"):
        SASRec.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(runs.UserError, match=r"cannot read a Popularity.*names no Popularity"):
        Popularity.from_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(runs.UserError, match=r"cannot read a SASRec"):
        SASRec.from_pretrained(tmp_path)


# ---------------------------------------------------------------- popularity


def test_popularity_counts_the_training_users_alone():
    data = dataset()
    popularity = Popularity.from_dataset(data)
    train = data.events[data.events["user"] < 32]["item"].value_counts()
    assert {i: c for i, c in enumerate(popularity.counts.tolist()) if c} == train.to_dict()
    offered = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(popularity.score(histories(1, 3), offered), popularity.counts[offered])
    with pytest.raises(NotImplementedError, match="Popularity has no sequence representation"):
        popularity.encode(histories(1, 3))


# ---------------------------------------------------------------- expected HitRatio@1


def test_expected_hit_ratio_equals_all_draws_written_out():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, (30, 9)).astype(float)  # many ties
    history = np.array([[9, 0, 1], [9, 9, 2]]).repeat(15, axis=0)
    target = random.integers(3, 9, 30)
    expected = []
    for row in range(30):
        free = [i for i in range(9) if i not in history[row] and i != target[row]]
        draws = []
        for others in itertools.combinations(free, 3):
            values, own = scores[row, list(others)], scores[row, target[row]]
            draws.append(0 if (values > own).any() else 1 / (1 + (values == own).sum()))
        expected.append(np.mean(draws))
    np.testing.assert_allclose(expected_hit_ratio(scores, history, target, size=4), expected, atol=1e-12)


def test_expected_hit_ratio_is_the_mean_over_drawn_candidates(model):
    rows = sequences(dataset(), "train", window=6)
    history = torch.from_numpy(rows.history)
    hits = []
    for seed in range(100):
        offered = candidates(rows, ITEMS, seed)
        best = model.score(history, torch.from_numpy(offered)).argmax(1).numpy()
        hits.append(np.take_along_axis(offered, best[:, None], 1)[:, 0] == rows.target)
    expected, drawn = hit_ratios(model, rows), np.mean(hits, axis=0)
    deviation = np.sqrt((expected * (1 - expected)).sum() / 100) / len(rows)
    assert abs(expected.mean() - drawn.mean()) < 4 * deviation


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        expected_hit_ratio(np.full((1, 30), np.nan), np.array([[0]]), np.array([1]))


# ---------------------------------------------------------------- training


def test_pieces_are_windows_of_the_histories_and_cover_them():
    windows = sequences(dataset(), "train", window=6, min_history=1)
    true = {tuple(np.append(h, t)) for h, t in zip(windows.history, windows.target, strict=True)}
    pieces, covered = Pieces(windows, seed=0), set()
    for epoch in range(12):
        pieces.set_epoch(epoch)
        rows = [pieces[i] for i in range(len(pieces))]
        assert true.issuperset(tuple(row) for row in rows)
        covered |= {tuple(row) for row in rows}
        assert {*windows.user} == {*windows.user[pieces.row]}
    assert len(covered) > 0.9 * len(true)
    assert len(pieces) < len(windows) / 3
    first = Pieces(windows, seed=0)
    np.testing.assert_array_equal(
        [first[i] for i in range(20)], [(pieces.set_epoch(0), pieces[i])[1] for i in range(20)]
    )


def test_fit_recommender_learns_the_law_and_keeps_the_result(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    data = dataset(users=200)
    model, history = training.fit_recommender(data, epochs=15, device="cpu")
    test = sequences(data, "test")
    assert hit_ratios(model, test).mean() > 0.9
    assert hit_ratios(Popularity.from_dataset(data), test).mean() < 0.3
    assert history["hit_ratio"].notna().sum() == 15
    monkeypatch.setattr(training, "fit", None)  # not called again
    again, same = training.fit_recommender(data, epochs=15, device="cpu")
    torch.testing.assert_close(again.item_embeddings, model.item_embeddings, rtol=0, atol=0)
    pd.testing.assert_frame_equal(same, history)
    assert not list((tmp_path / "training").iterdir())
