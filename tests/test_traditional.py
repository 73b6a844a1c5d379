import numpy as np
import pandas as pd
import pytest
import torch
from test_recommenders import dataset

from ilora import runs, traditional
from ilora.data import sequences
from ilora.draws import hit_ratios
from ilora.recommenders import Popularity
from ilora.traditional import Pieces, Windows, choose_l2, fit_recommender, table_1

FAST = {"epochs": 8, "window": 6, "device": "cpu", "learning_rate": 0.02, "batch_size": 32, "dropout": 0.1}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------- rows


def test_windows_are_the_histories_and_what_came_next():
    windows = sequences(dataset(), "train", window=6, min_history=1)
    rows = Windows(windows)
    assert len(rows) == len(windows)
    for i in (0, 7, len(rows) - 1):
        assert rows[i].tolist() == [*windows.history[i], windows.target[i]]


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


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["GRU4Rec", "Caser", "SASRec"])
def test_fit_recommender_learns_the_law(kind):
    data = dataset(users=120)
    model, history = fit_recommender(data, kind=kind, **FAST)
    test = sequences(data, "test", window=6)
    assert type(model).__name__ == kind
    assert hit_ratios(model, test).mean() > 0.9
    assert hit_ratios(Popularity.from_dataset(data), test).mean() < 0.3
    assert history["hit_ratio"].notna().sum() == 8
    best = history["hit_ratio"].max()
    assert hit_ratios(model, sequences(data, "validation", window=6)).mean() == pytest.approx(best, abs=1e-6)


def test_a_recommender_is_made_once_and_kept(home, monkeypatch):
    data, settings = dataset(), FAST | {"epochs": 2}
    model, history = fit_recommender(data, **settings)
    other, _ = fit_recommender(data, l2=0.1, **settings)
    assert not torch.equal(other.item_embeddings, model.item_embeddings)
    monkeypatch.setattr(traditional, "fit", None)  # not called again
    again, same = fit_recommender(data, **settings)
    torch.testing.assert_close(again.item_embeddings, model.item_embeddings, rtol=0, atol=0)
    pd.testing.assert_frame_equal(same, history)
    assert not list((home / "training").iterdir())


@pytest.mark.parametrize("kind", ["GRU4Rec", "Caser", "SASRec"])
def test_negatives_and_recency_learn_the_law(kind):
    given = {"negatives": 15} if kind == "Caser" else {"negatives": 15, "recency": 2.0}
    data = dataset(users=120)
    model, _ = fit_recommender(data, kind=kind, **FAST | given)
    assert hit_ratios(model, sequences(data, "test", window=6)).mean() > 0.9


def test_the_loss_has_a_place_of_its_own_in_the_cache_and_its_default_none(home, monkeypatch):
    asked = []

    def stop(_, parameters, *__, **___):
        asked.append(parameters)
        raise InterruptedError

    monkeypatch.setattr(runs, "cached", stop)
    for given in ({}, {"negatives": 0, "recency": 0.0}, {"negatives": 9, "recency": 2.0}):
        with pytest.raises(InterruptedError):
            fit_recommender(dataset(), **FAST, **given)
    plain, same, own = asked
    assert plain == same and not {"negatives", "recency"} & plain.keys()
    assert own == plain | {"negatives": 9, "recency": 2.0}


def test_the_loss_reaches_the_model_and_is_no_part_of_what_is_kept(home):
    made = [fit_recommender(dataset(), **FAST | {"epochs": 1} | given)[0]
            for given in ({}, {"negatives": 9}, {"recency": 2.0})]  # fmt: skip
    assert all(not torch.equal(made[0].item_embeddings, other.item_embeddings) for other in made[1:])
    assert all(model.negatives == model.recency == 0 and model.config == made[0].config for model in made)


def test_what_cannot_be_trained_is_refused_before_any_work(home):
    with pytest.raises(runs.UserError, match=r"no recommender 'BERT4Rec'.*GRU4Rec, Caser, SASRec, MoRec"):
        fit_recommender(dataset(), kind="BERT4Rec")
    with pytest.raises(runs.UserError, match="MoRec needs a text encoder"):
        fit_recommender(dataset(), kind="MoRec")
    with pytest.raises(runs.UserError, match="Caser with text_encoder 'x'"):
        fit_recommender(dataset(), kind="Caser", text_encoder="x")
    with pytest.raises(runs.UserError, match="negatives must be 0 to 40, not 41"):
        fit_recommender(dataset(), negatives=41)
    with pytest.raises(runs.UserError, match="recency must be 0 to 10, not -1"):
        fit_recommender(dataset(), recency=-1)
    with pytest.raises(runs.UserError, match="Caser has no recency to choose: leave recency at 0"):
        fit_recommender(dataset(), kind="Caser", recency=2)
    with pytest.raises(runs.UserError, match="MoRec has no negatives to choose"):
        fit_recommender(dataset(), kind="MoRec", text_encoder="x", negatives=2)
    assert not list(home.iterdir())


def test_small_models_train_on_one_thread_without_subnormal_numbers():
    small, threads = torch.tensor(1e-30), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with traditional._for_small_models():
            assert torch.get_num_threads() == 1
            assert (small * 1e-10).item() == 0
        assert torch.get_num_threads() == 2
        assert (small * 1e-10).item() > 0
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- Table 1's recipe


def test_a_batch_of_table_1_has_256_targets_whatever_the_rows():
    for window in (5, 10):
        assert table_1("Caser", window)["batch_size"] == 256
        assert abs(table_1("SASRec", window)["batch_size"] * window - 256) <= window / 2


def test_l2_is_chosen_by_validation(monkeypatch):
    asked, values = [], {0.0: 0.2, 1e-5: 0.4, 1e-4: 0.4, 1e-3: 0.1}

    def trained(data, seed, l2, **settings):
        asked.append((seed, l2, settings))
        return None, pd.DataFrame({"epoch": [1, 2, 3], "hit_ratio": [0.1, values[l2], np.nan]})

    monkeypatch.setattr(traditional, "fit_recommender", trained)
    chosen, table = choose_l2(dataset(), "GRU4Rec", grid=(1e-3, 1e-4, 0.0, 1e-5), seed=3, epochs=2)
    assert chosen == 1e-5  # the smaller of two equals
    assert table["l2"].tolist() == sorted(values) and table["hit_ratio"].tolist() == [0.2, 0.4, 0.4, 0.1]
    assert table["epoch"].tolist() == [2, 2, 2, 1]
    assert {seed for seed, _, _ in asked} == {3}
    assert all(settings == table_1("GRU4Rec") | {"epochs": 2} for _, _, settings in asked)
