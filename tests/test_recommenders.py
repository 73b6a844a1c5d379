import numpy as np
import pandas as pd
import pytest
import torch

from ilora.data import Dataset, Questions, sequences
from ilora.errors import UserError
from ilora.recommenders import Caser, GRU4Rec, Popularity, Recommender, SASRec, SequenceModel

ITEMS = 40


def dataset(users=40):
    """Events with one rule: item i is followed by i + 7. The user u starts with item 3 u."""
    splits = ["train"] * (users - 8) + ["validation"] * 4 + ["test"] * 4
    lengths = 6 + np.arange(users) % 20
    user = np.repeat(np.arange(users), lengths)
    time = np.concatenate([np.arange(length) for length in lengths])
    events = pd.DataFrame({"user": user, "item": (3 * user + 7 * time) % ITEMS, "time": time})
    items = pd.DataFrame({"id": range(ITEMS), "title": [f"item {i}" for i in range(ITEMS)], "text": ""})
    users = pd.DataFrame({"user": range(users), "split": splits})
    return Dataset(name="rule", key="rule", items=items, events=events, users=users)


def make(kind, window=6):
    """A small model whose weights are all large enough to change its output."""
    torch.manual_seed(0)
    model = kind(ITEMS, dim=8, window=window).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=[SASRec, GRU4Rec, Caser])
def model(request):
    return make(request.param)


def histories(rows, length, window=6):
    history = torch.full((rows, window), ITEMS)
    history[:, window - length :] = torch.randint(ITEMS, (rows, length), generator=torch.Generator().manual_seed(1))
    return history


def edit(history, position):
    """The histories with another item at one position."""
    edited = history.clone()
    edited[:, position] = (edited[:, position] + 1) % ITEMS
    return edited


# ---------------------------------------------------------------- all sequence models


def test_padding_has_no_effect(model):
    history = histories(5, length=4)
    before = model.encode(history)
    with torch.no_grad():
        model.items.weight[ITEMS] += 100
    torch.testing.assert_close(model.encode(history), before, rtol=0, atol=0)
    torch.testing.assert_close(model.encode(history[:, 2:]), before)  # the same history without its padding
    assert torch.isfinite(model.encode(torch.full((1, 6), ITEMS))).all()


def test_a_state_of_sasrec_depends_on_the_items_up_to_its_position():
    model, history = make(SASRec), histories(5, length=6)
    states = model.states(model.items(history), history != ITEMS, n=6)
    assert states.shape == (5, 6, 8)
    torch.testing.assert_close(states[:, -1], model.encode(history))
    torch.testing.assert_close(model.states(model.items(history), history != ITEMS, n=2), states[:, -2:])
    for position in range(6):
        edited = edit(history, position)
        change = (model.states(model.items(edited), edited != ITEMS, n=6) - states).abs().amax(-1)
        assert (change[:, :position] < 1e-6).all() and change[:, position:].min() > 1e-4


def test_every_item_of_the_window_and_the_order_matter(model):
    history = histories(5, length=6)
    before = model.encode(history)
    for position in range(6):
        assert (model.encode(edit(history, position)) - before).abs().amax(-1).min() > 1e-4
    assert (model.encode(history.flip(1)) - before).abs().amax(-1).min() > 1e-3


def test_rows_of_a_batch_are_independent(model):
    history = histories(5, length=5)
    torch.testing.assert_close(model.encode(history)[3], model.encode(history[3:4])[0], rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_last_item(model):
    batch = torch.cat([histories(3, length=4), torch.tensor([[3], [4], [5]])], dim=1)
    logits = torch.stack([model.encode(row[None, :6])[0] @ model.item_embeddings.T for row in batch])
    losses = logits.logsumexp(1) - logits[range(3), [3, 4, 5]]
    torch.testing.assert_close(model(batch), losses.mean())


def test_a_history_longer_than_the_window_is_an_error(model):
    with pytest.raises(ValueError, match="cut the history of 7 items to the window of 6"):
        model.encode(torch.zeros(1, 7, dtype=torch.long))


def test_score_gives_the_scores_of_the_candidates_of_questions():
    rows = sequences(dataset(), "test", window=9)
    questions = Questions(rows, ITEMS, seed=0)
    batch = [questions[i] for i in range(len(questions))]
    assert {(history < ITEMS).sum() for history, _, _ in batch} == {3, 4, 5, 6, 7, 8, 9}
    recent = torch.from_numpy(rows.history[:, 3:])  # the last 6 items: the models' window
    for recommender in (make(SASRec), make(GRU4Rec), make(Caser), Popularity.from_dataset(dataset())):
        scores, every = recommender.score(batch), recommender.score_all(recent)
        assert scores.shape == (len(questions), 20) and not scores.requires_grad
        for row, candidates in enumerate(questions.candidates):
            torch.testing.assert_close(scores[row], every[row, candidates])


def test_l2_is_that_of_adam_not_of_adamw(model):
    def step(optimizer):
        optimizer.zero_grad()
        model(torch.cat([histories(4, length=6), torch.ones(4, 1, dtype=torch.long)], dim=1)).backward()
        optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    start = [parameter.detach().clone() for parameter in model.parameters()]
    expected = step(torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.3))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    stepped = step(torch.optim.AdamW(model.parameter_groups(0.3), lr=0.01))
    torch.testing.assert_close(stepped, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- each model against its equations


def test_sasrec_is_a_causal_post_norm_transformer_over_items_and_positions():
    """Compared with TransformerEncoderLayer of torch, for histories with and without padding."""
    model = make(SASRec)
    layers = [torch.nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True) for _ in model.blocks]
    for layer, block in zip(layers, model.blocks, strict=True):
        parts = (block.attention, block.feed_forward[0], block.feed_forward[2], *block.norms)
        reference = (layer.self_attn, layer.linear1, layer.linear2, layer.norm1, layer.norm2)
        for target, source in zip(reference, parts, strict=True):
            target.load_state_dict(source.state_dict())
    for length in (1, 4, 6):
        history = histories(3, length)
        x = model.norm(model.items(history[:, 6 - length :]) + model.positions.weight[6 - length :])
        for layer in layers:
            x = layer.eval()(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(length), is_causal=True)
        torch.testing.assert_close(model.encode(history), x[:, -1], rtol=1e-4, atol=1e-4)


def test_gru4rec_is_a_gated_recurrent_unit_from_item_to_item():
    """Cho et al. 2014, with the gates in the order of torch, one item at a time."""
    model, history = make(GRU4Rec), histories(3, length=4)
    gru = model.gru
    for row in range(3):
        state = torch.zeros(gru.hidden_size)
        for position in range(2, 6):
            item = model.items.weight[history[row, position]]
            reset_i, update_i, new_i = (gru.weight_ih_l0 @ item).chunk(3)
            reset_h, update_h, new_h = (gru.weight_hh_l0 @ state).chunk(3)
            update = torch.sigmoid(update_i + update_h)
            new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
            state = (1 - update) * new + update * state
        expected = model.last.weight @ state + model.last.bias
        torch.testing.assert_close(model.encode(history)[row], expected, rtol=1e-4, atol=1e-4)


def test_caser_is_filters_over_the_image_of_the_window():
    """Tang and Wang 2018, Eqs. 3 to 9, one filter and one position at a time."""
    model, history = make(Caser), histories(3, length=4)
    for row in range(3):
        image = torch.stack([model.items.weight[i] if i != ITEMS else torch.zeros(8) for i in history[row]])
        features = []
        for height, layer in enumerate(model.horizontal, start=1):
            for weight, bias in zip(layer.weight, layer.bias, strict=True):  # weight: (dim, height)
                values = [(weight.T * image[top : top + height]).sum() + bias for top in range(6 - height + 1)]
                features.append(max(*values, torch.tensor(0.0)))
        assert len(features) == 4 * 16
        for column in range(8):
            for weight, bias in zip(model.vertical.weight, model.vertical.bias, strict=True):
                features.append((weight * image[:, column]).sum() + bias)
        state = model.last.weight @ torch.stack(features) + model.last.bias
        torch.testing.assert_close(model.encode(history)[row], state, rtol=1e-4, atol=1e-4)


def test_filters_of_caser_are_at_most_as_high_as_the_window():
    model = make(Caser, window=3)
    assert [layer.kernel_size for layer in model.horizontal] == [(1,), (2,), (3,)]
    assert model.encode(histories(2, length=1, window=3)).shape == (2, 8)


# ---------------------------------------------------------------- files


def test_a_saved_model_is_loaded_by_its_class_and_by_a_base_class(tmp_path, model):
    popularity = Popularity.from_dataset(dataset())
    for saved, base in ((model, SequenceModel), (popularity, Recommender)):
        saved.save_pretrained(tmp_path)
        history = histories(3, length=4)
        for kind in (type(saved), base):
            loaded = kind.from_pretrained(tmp_path)
            assert type(loaded) is type(saved) and not loaded.training
            torch.testing.assert_close(loaded.score_all(history), saved.score_all(history), rtol=0, atol=0)


def test_loading_anything_else_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read a SASRec.*No such file"):
        SASRec.from_pretrained(tmp_path)
    make(SASRec).save_pretrained(tmp_path)
    for kind in (Popularity, GRU4Rec):
        with pytest.raises(UserError, match=rf"cannot read a {kind.__name__}.*names SASRec, not {kind.__name__}"):
            kind.from_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(UserError, match=r"cannot read a SASRec"):
        SASRec.from_pretrained(tmp_path)


# ---------------------------------------------------------------- popularity


def test_popularity_counts_the_events_of_training_users():
    data = dataset()
    popularity = Popularity.from_dataset(data)
    train = data.events[data.events["user"] < 32]["item"].value_counts()
    assert {i: c for i, c in enumerate(popularity.counts.tolist()) if c} == train.to_dict()
    torch.testing.assert_close(popularity.score_all(histories(2, 3)), popularity.counts.repeat(2, 1))
