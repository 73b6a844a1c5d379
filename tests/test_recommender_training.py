import numpy as np
import pandas as pd
import pytest
import torch
from test_recommenders import dataset

from ilora.data import sequences
from ilora.errors import UserError
from ilora.evaluation import hit_ratios
from ilora.recommenders import Popularity, choose_regularisation, fit_recommender, training
from ilora.recommenders.training import TrainingRows

FAST = {"epochs": 3, "window": 6, "device": "cpu", "learning_rate": 0.01, "batch_size": 32, "dropout": 0.1}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------- rows


def test_rows_are_histories_followed_by_targets():
    windows = sequences(dataset(), "train", window=6, min_history=1)
    rows = TrainingRows(windows)
    assert len(rows) == len(windows)
    for i in (0, 7, len(rows) - 1):
        assert rows[i].tolist() == [*windows.history[i], windows.target[i]]


def test_with_a_step_each_epoch_starts_at_a_random_window():
    windows = sequences(dataset(), "train", window=6, min_history=1)
    rows, again, starts = TrainingRows(windows, step=6, seed=1), TrainingRows(windows, step=6, seed=1), set()
    every = np.column_stack([windows.history, windows.target])
    assert len(rows) == len(every) // 6
    for epoch in range(40):
        rows.set_epoch(epoch)
        start = next(start for start in range(6) if (rows[0] == every[start]).all())
        np.testing.assert_array_equal([rows[i] for i in range(len(rows))], every[start::6][: len(rows)])
        starts.add(start)
    assert starts == set(range(6))
    again.set_epoch(39)
    np.testing.assert_array_equal(again.data, rows.data)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["GRU4Rec", "Caser", "SASRec"])
def test_fit_recommender_learns_the_rule(kind):
    data = dataset(users=120)
    model, history = fit_recommender(data, kind=kind, **FAST)
    test = sequences(data, "test", window=6)
    assert type(model).__name__ == kind
    assert hit_ratios(model, test).mean() > 0.9
    assert hit_ratios(Popularity.from_dataset(data), test).mean() < 0.3
    assert history["hit_ratio"].notna().sum() == 3
    best = history["hit_ratio"].max()
    assert hit_ratios(model, sequences(data, "validation", window=6)).mean() == pytest.approx(best, abs=1e-6)


def test_a_recommender_is_trained_once(home, monkeypatch):
    data, settings = dataset(), FAST | {"epochs": 2}
    model, history = fit_recommender(data, **settings)
    other, _ = fit_recommender(data, l2=0.1, **settings)
    assert not torch.equal(other.item_embeddings, model.item_embeddings)
    monkeypatch.setattr(training, "fit", None)  # must not be called
    again, same = fit_recommender(data, **settings)
    torch.testing.assert_close(again.item_embeddings, model.item_embeddings, rtol=0, atol=0)
    pd.testing.assert_frame_equal(same, history)
    assert not list((home / "training").iterdir())


def test_wrong_arguments_are_an_error_before_any_work(home):
    with pytest.raises(UserError, match=r"no recommender 'BERT4Rec'.*GRU4Rec, Caser, SASRec, MoRec"):
        fit_recommender(dataset(), kind="BERT4Rec")
    with pytest.raises(UserError, match="MoRec needs a text encoder"):
        fit_recommender(dataset(), kind="MoRec")
    with pytest.raises(UserError, match="Caser with text_encoder 'x'"):
        fit_recommender(dataset(), kind="Caser", text_encoder="x")
    assert not list(home.iterdir())


def test_small_models_train_on_one_thread_without_subnormal_numbers(monkeypatch):
    small, threads = torch.tensor(1e-30), torch.get_num_threads()

    def fit(*_):
        assert torch.get_num_threads() == 1
        assert (small * 1e-10).item() == 0
        return pd.DataFrame({"hit_ratio": [0.5]})

    monkeypatch.setattr(training, "fit", fit)
    try:
        torch.set_num_threads(2)
        fit_recommender(dataset(), **FAST)
        assert torch.get_num_threads() == 2
        assert (small * 1e-10).item() > 0
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- dropout and L2


def test_validation_chooses_dropout_and_l2(monkeypatch):
    calls, values = [], {(0.2, 0.0): 0.2, (0.2, 1e-5): 0.4, (0.5, 0.0): 0.4, (0.5, 1e-5): 0.1}

    def trained(data, seed, dropout, l2, **settings):
        calls.append((seed, settings))
        return None, pd.DataFrame({"epoch": [1, 2, 3], "hit_ratio": [0.1, values[dropout, l2], np.nan]})

    monkeypatch.setattr(training, "fit_recommender", trained)
    grid = [{"dropout": dropout, "l2": l2} for dropout, l2 in values]
    chosen, table = choose_regularisation(dataset(), "GRU4Rec", grid, seed=3, epochs=2)
    assert chosen == {"dropout": 0.2, "l2": 1e-5}  # the first of two equals
    assert list(zip(table["dropout"], table["l2"], strict=True)) == list(values)
    assert table["hit_ratio"].tolist() == [0.2, 0.4, 0.4, 0.1] and table["epoch"].tolist() == [2, 2, 2, 1]
    assert calls == [(3, {"kind": "GRU4Rec", "epochs": 2})] * 4
