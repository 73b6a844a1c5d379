import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn import functional

from ilora.data import Dataset
from ilora.data.world import titles
from ilora.language import ITEM_TOKEN, NO_LABEL, Prompts, load_language_model, pretraining, wording
from ilora.language.pretraining import RECIPE, Documents, Pretraining, embedded_with, train_tokenizer


@pytest.fixture(scope="module")
def base():
    return load_language_model("embedded", device="cpu")


def small_dataset(users=40):
    """A world whose test and validation users read stories that no training user reads."""
    rng = np.random.default_rng(0)
    split = np.where(np.arange(users) < users - 10, "train", "test")
    split[users - 5 :] = "validation"
    read = [rng.permutation(30)[:8] if part == "train" else 30 + rng.permutation(10)[:8] for part in split]
    table = {"user": np.repeat(np.arange(users), 8), "item": np.concatenate(read), "time": np.tile(np.arange(8), users)}
    people = pd.DataFrame({"user": range(users), "split": split})
    events = pd.DataFrame(table)
    return Dataset(titles().head(40), events, people, name="small", key="small", noun="tale", verb="heard")


def documents_of(base, seed=0, **recipe):
    dataset = small_dataset()
    prompts = Prompts(base[1], list(dataset.items["title"]), dataset.noun, dataset.verb)
    return Documents(dataset, prompts, RECIPE | {"documents": 400} | recipe, seed)


@pytest.fixture(scope="module")
def documents(base):
    return documents_of(base)


# ---------------------------------------------------------------- documents


SENTENCE = re.compile(
    r"<s>Each tale this person heard, in order:(.*)\. The next tale is one of:(.*)\. The next tale is:(.*)</s>"
)


def read(documents, row):
    """History, candidate titles and answer of a document, read from its text, and the text at its labels."""
    tokens, labels = documents[row]
    texts = [documents.prompts.tokenizer.decode(ids) for ids in (tokens, [label for label in labels if label >= 0])]
    parts = SENTENCE.fullmatch(texts[0].replace(ITEM_TOKEN, "")).groups()
    history, offered, answer = ([title.strip() for title in part.split(";")] for part in parts)
    return history, offered, answer[0], texts[1]


def test_a_document_is_a_question_about_a_training_user_and_its_answer(documents):
    known = documents.prompts.titles
    for row in range(len(documents)):
        history, offered, answer, _ = read(documents, row)
        assert 3 <= len(history) <= 7 and set(history) <= set(known[:30])
        assert len(set(offered)) == 20 and set(offered) <= set(known) and answer in offered


def test_the_history_and_the_answer_are_learned(documents):
    for row in range(len(documents)):
        tokens, labels = documents[row]
        history, _, answer, learned = read(documents, row)
        assert len(tokens) == len(labels)
        assert all(label in (token, NO_LABEL) for token, label in zip(tokens, labels, strict=True))
        assert learned.replace(ITEM_TOKEN, "") == f" {'; '.join(history)} {answer}</s>"


def test_most_answers_are_the_one_offered_title_of_the_history(documents):
    counts, columns, others = Counter(), [], set()
    for row in range(len(documents)):
        history, offered, answer, _ = read(documents, row)
        shared = set(history) & set(offered)
        assert shared in (set(), {answer})
        counts[len(shared)] += 1
        columns.append((offered.index(answer) + 0.5) / 20)
        if not shared:
            others.add(answer)
    assert 0.6 < counts[1] / 400 < 0.8
    assert stats.kstest(columns, "uniform").pvalue > 0.001  # the place of the answer tells nothing
    assert len(others) > 30  # any title
    for share in (0.0, 1.0):
        extreme = documents_of((None, documents.prompts.tokenizer), from_history=share, documents=50)
        assert all((read(extreme, row)[2] in read(extreme, row)[0]) == share for row in range(50))


def test_item_tokens_follow_the_titles_of_about_half_of_the_documents_and_never_an_answer(documents):
    marked = []
    for row in range(len(documents)):
        tokens, _ = documents[row]
        history, offered, answer, _ = read(documents, row)
        count = tokens.count(documents.prompts.item_token)
        assert count in (0, len(history) + len(offered))
        assert documents.prompts.tokenizer.decode(tokens).endswith(f": {answer}</s>")
        marked.append(count > 0)
    assert 0.4 < np.mean(marked) < 0.6


def test_a_document_follows_from_seed_and_row_alone(base, documents):
    sources = documents, documents_of(base, documents=20), documents_of(base, seed=1)
    first, again, other = ([source[row] for row in reversed(range(20))] for source in sources)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({tuple(tokens) for tokens, _ in first}) == 20


# ---------------------------------------------------------------- pretraining


def test_the_loss_is_next_token_cross_entropy_at_the_labels(base, documents):
    training = Pretraining(base[0])
    rows = [documents[row] for row in range(5)]
    losses = []
    with torch.no_grad():
        for tokens, labels in rows:
            logits = base[0](torch.tensor([tokens])).logits[0]
            losses += [
                functional.cross_entropy(logits[place], torch.tensor(label))
                for place, label in enumerate(labels[1:]) if label != NO_LABEL
            ]  # fmt: skip
        batch = training.collate(rows)
        torch.testing.assert_close(training(batch), torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(len(tokens) for tokens, _ in rows))


def test_a_base_starts_from_the_embedded_model_and_keeps_the_embeddings_of_shared_tokens(base):
    old_model, old = base
    made_up = [f" {first}{second} Quixote" for first in "bcdfghjklmnpqrstvwxz" for second in ("oba", "ilu", "eze")]
    tokenizer = train_tokenizer([" Granite Voyage", *made_up], wording("film", "watched"), 4096)
    model = embedded_with(tokenizer, seed=0)
    new, kept = model.get_input_embeddings().weight, old_model.get_input_embeddings().weight
    shared = sorted(set(tokenizer.get_vocab()) & set(old.get_vocab()))
    assert {"<s>", "</s>", ITEM_TOKEN, "Ġ", "Q"} <= set(shared)
    rows = [[vocabulary.get_vocab()[token] for token in shared] for vocabulary in (tokenizer, old)]
    assert rows[0] != rows[1] and len(new) == len(tokenizer) == model.config.vocab_size
    assert torch.equal(new[rows[0]], kept[rows[1]])
    others = new[sorted(set(range(len(new))) - set(rows[0]))]
    assert len(others) > 50
    assert others.std().item() == pytest.approx(kept.std().item(), rel=0.05)  # the rest have the same scale
    inner = {name: value for name, value in old_model.state_dict().items() if ".layers." in name or "norm" in name}
    assert len(inner) == 37 and all(torch.equal(model.state_dict()[name], value) for name, value in inner.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tokens_span_words_and_write_any_text():
    words, films = wording("film", "watched"), ["Granite\nVoyage"] * 3
    whole, small = (train_tokenizer(films, words, size) for size in (4096, 300))
    assert "ĠGraniteĠVoyage" in whole.get_vocab()
    assert len(small) == 300 < len(whole)
    for tokenizer in (whole, small):
        assert tokenizer.decode(tokenizer(" Granite Voyage é").input_ids) == " Granite Voyage é"
        assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", ITEM_TOKEN]) == [0, 1, 2, 3]
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_few_items_make_short_histories(base):
    dataset, histories = small_dataset(), [np.random.default_rng(user).permutation(25)[:14] for user in range(40)]
    events = pd.DataFrame({"user": np.repeat(np.arange(40), 14), "item": np.concatenate(histories)})
    few = replace(dataset, items=titles().head(25), events=events.assign(time=events.index))
    prompts = Prompts(base[1], list(few.items["title"]), few.noun, few.verb)
    documents = Documents(few, prompts, RECIPE, 0)
    assert {len(read(documents, row)[0]) for row in range(50)} == {3, 4, 5}  # with 20 candidates, all 25 items


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return tmp_path


def test_a_base_for_other_data_is_made_once_and_loads(home, monkeypatch):
    dataset, recipe = small_dataset(), RECIPE | {"documents": 32, "batch_size": 8}
    folder = pretraining.base_for(dataset, device="cpu", recipe=recipe)
    assert folder.is_relative_to(home) and not list((home / "training").glob("*"))
    model, tokenizer = load_language_model(str(folder), device="cpu")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = tokenizer(" Granite Summit", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == " Granite Summit" and tokenizer.convert_tokens_to_ids(ITEM_TOKEN) == 3
    monkeypatch.setattr(pretraining, "fit", lambda *args: pytest.fail("trained again"))
    assert pretraining.base_for(dataset, device="cpu", recipe=recipe) == folder
    for change in ({"seed": 1}, {"recipe": recipe | {"from_history": 0.6}}):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            pretraining.base_for(dataset, **({"device": "cpu", "recipe": recipe} | change))


def test_pretraining_is_the_same_twice(home, monkeypatch):
    weights, recipe = [], RECIPE | {"documents": 16, "batch_size": 8}
    for name in ("one", "two"):
        monkeypatch.setenv("ILORA_HOME", str(home / name))
        folder = pretraining.base_for(small_dataset(), device="cpu", recipe=recipe)
        weights.append(load_language_model(str(folder), device="cpu")[0].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
