import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn import functional

from ilora import data, language_model, runs
from ilora.data import Dataset
from ilora.evaluation import ask, metrics
from ilora.language_model import (
    EMBEDDED,
    LONGEST_LIST,
    SPECIAL,
    VOCABULARY,
    Documents,
    Pretraining,
    Projector,
    load_language_model,
)
from ilora.model import LanguageRecommender, Questions
from ilora.prompts import ITEM_TOKEN, NO_LABEL, Prompts, wording
from ilora.world import make_world, titles


@pytest.fixture(scope="module")
def base():
    return load_language_model("embedded", device="cpu")


def small_dataset(users=40, text=True):
    """A world whose test and validation users read stories that no training user reads."""
    library = titles().head(40)
    items = library if text else library.assign(text="")
    rng = np.random.default_rng(0)
    split = np.where(np.arange(users) < users - 10, "train", "test")
    split[users - 5 :] = "validation"
    read = [rng.permutation(30)[:8] if part == "train" else 30 + rng.permutation(10)[:8] for part in split]
    table = {"user": np.repeat(np.arange(users), 8), "item": np.concatenate(read), "time": np.tile(np.arange(8), users)}
    people = pd.DataFrame({"user": range(users), "split": split})
    return Dataset(items, pd.DataFrame(table), people, name="small", key="small", noun="tale", verb="heard")


@pytest.fixture(scope="module")
def documents(base):
    dataset = small_dataset()
    prompts = Prompts(base[1], list(dataset.items["title"]), dataset.noun, dataset.verb)
    return Documents(dataset, prompts, number=400, seed=0)


# ---------------------------------------------------------------- the embedded base


def test_the_embedded_base_is_small_and_plain():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 10e6
    assert {file.suffix for file in EMBEDDED.iterdir()} <= {".json", ".safetensors"}
    for file in EMBEDDED.glob("*.json"):
        text = file.read_text("utf-8")
        assert "auto_map" not in text and "/work/" not in text and "/home/" not in text
        json.loads(text)


def test_the_embedded_base_loads_frozen_and_in_eval_mode(base):
    model, tokenizer = base
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).dtype == torch.float32  # on the CPU
    assert len(tokenizer) <= VOCABULARY == model.get_input_embeddings().num_embeddings
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_text_makes_the_round_trip_through_tokens(base):
    _, tokenizer = base
    texts = [*titles()["title"], *wording("story", "read"), "Amélie — 七人の侍", "  two  spaces\n", "Se7en (1995)"]
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == text
    for title in titles()["title"]:
        assert len(tokenizer(f" {title}", add_special_tokens=False).input_ids) <= 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILORA_HOME", str(tmp_path_factory.mktemp("home")))
        yield data.load("world", users=400, conflict=0.5, seed=0)


@pytest.mark.parametrize("behaviour", [False, True], ids=["text-only", "placeholders"])
def test_before_any_adapter_it_names_an_offered_title_but_not_the_right_one(base, world, behaviour, monkeypatch):
    """The paper's Llama2 row in miniature: at least 90 % valid answers, right as often as by chance."""
    model, tokenizer = base
    prompts = Prompts(tokenizer, list(world.items["title"]), world.noun, world.verb)
    test = data.sequences(world, "test")
    chosen = np.sort(np.random.default_rng(0).choice(len(test), 120, replace=False))
    if behaviour:
        plain = prompts.batch
        monkeypatch.setattr(prompts, "batch", lambda *args: plain(*args[:3], True))
    recommender = LanguageRecommender(model, prompts)
    found = metrics(ask(recommender, Questions(test.take(chosen), len(world.items), seed=0)))
    assert found["valid_ratio"]["value"] >= 0.9
    assert found["hit_ratio"]["low"] <= 0.05 <= found["hit_ratio"]["high"] and found["hit_ratio"]["value"] < 0.12


def test_it_knows_what_everybody_reads_next(base):
    """Of two stories after a history, the first follower is likelier than a story drawn at random."""
    model, tokenizer = base
    world = make_world(users=60, conflict=0.0, seed=9)
    prompts = Prompts(tokenizer, list(world.items["title"]), "story", "read")
    rng, better = np.random.default_rng(0), []
    for user in range(60):
        items = world.events["item"].to_numpy()[20 * user : 20 * user + 8]
        unread = np.setdiff1d(np.arange(len(world.items)), items)
        pair = world.followers[0, items[-1], 0], rng.choice(unread)
        if pair[0] in items:
            continue
        scores = []
        for item in pair:
            listed, _ = prompts.join([prompts.answers[i] for i in [*items, item]])
            tokens, answer = prompts.opening + listed, prompts.answers[item]
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            places = range(len(tokens) - len(answer) - 1, len(tokens) - 1)
            scores.append(sum(logits[place, tokens[place + 1]] for place in places))
        better.append(bool(scores[0] > scores[1]))
    assert len(better) > 40 and np.mean(better) > 0.8


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize("name", ["llama", "no/such/folder/here", ""])
def test_a_base_model_that_is_no_name_and_no_folder_is_refused(name):
    with pytest.raises(runs.UserError, match="base_model"):
        load_language_model(name, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(runs.UserError, match="base_model"):
        load_language_model(str(tmp_path), device="cpu")


def test_a_folder_with_pickled_weights_alone_is_refused(base, tmp_path):
    model, tokenizer = base
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(runs.UserError, match="safetensors"):
        load_language_model(str(tmp_path), device="cpu")


# ---------------------------------------------------------------- documents


def kind_of(documents, read, learned):
    """Which kind a document is, told from its tokens."""
    prompts = documents.prompts
    if read == prompts.opening:
        return "history"
    if learned[-1:] != [prompts.end]:
        return "about"
    return "list" if read[1 : 1 + len(prompts.offer)] == prompts.offer else "choice"


def parts(documents, row):
    """Tokens without labels, tokens with labels."""
    tokens, labels = documents[row]
    read = sum(label == NO_LABEL for label in labels)
    return tokens[:read], tokens[read:], labels[read:]


def test_documents_are_of_four_kinds_in_the_shares_of_the_recipe(documents):
    kinds = Counter(kind_of(documents, *parts(documents, row)[:2]) for row in range(len(documents)))
    expected = np.array([0.32, 0.02, 0.33, 0.33]) * len(documents)
    found = [kinds[kind] for kind in ("history", "about", "list", "choice")]
    assert stats.chisquare(found, expected).pvalue > 0.001 and min(found) > 0


def test_labels_are_the_last_tokens_themselves_and_never_the_question(documents):
    for row in range(len(documents)):
        tokens, labels = documents[row]
        read, learned, theirs = parts(documents, row)
        assert len(tokens) == len(labels) and theirs == learned and len(learned) > 0 and len(read) > 0
        assert NO_LABEL not in theirs and read[0] == documents.prompts.tokenizer.bos_token_id


def titles_in(documents, tokens):
    """Titles of a list of real titles; None for made-up ones."""
    known = {tuple(answer): title for answer, title in zip(documents.prompts.answers, documents.prompts.titles, strict=True)}
    found, piece = [], []
    for token in [*[t for t in tokens if t != documents.prompts.item_token], *documents.prompts.separator]:
        if [token] == documents.prompts.separator:
            found.append(known.get(tuple(piece)))
            piece = []
        else:
            piece.append(token)
    return None if None in found else found


def test_each_kind_is_learned_where_there_is_something_to_learn(documents):
    prompts, real, columns = documents.prompts, Counter(), []
    train = set(prompts.titles[:30])
    for row in range(len(documents)):
        read, learned, _ = parts(documents, row)
        kind = kind_of(documents, read, learned)
        if kind == "history":
            history = titles_in(documents, learned)
            assert 3 <= len(history) <= LONGEST_LIST and set(history) <= train
        elif kind == "about":
            title = titles_in(documents, read[1:-1])[0]
            item = prompts.titles.index(title)
            assert learned == prompts.tokenizer(f" {titles()['text'][item]}", add_special_tokens=False).input_ids
        else:
            before, offered = split_at(read, prompts.offer)
            assert offered[-len(prompts.question) :] == prompts.question
            offered = titles_in(documents, offered[: -len(prompts.question)])
            if kind == "choice":  # its history, too, is of a training user
                history = titles_in(documents, before[len(prompts.opening) :])
                assert 3 <= len(history) <= 10 and set(history) <= train
            if offered is None:
                continue
            named = titles_in(documents, learned[:-1])
            real[kind] += 1
            if kind == "list":
                assert Counter(named) == Counter(offered)
            else:
                assert len(named) == 1 and named[0] in offered and len(set(offered)) == len(offered)
                columns.append((offered.index(named[0]) + 0.5) / len(offered))
    assert min(real["list"], real["choice"]) > 20
    assert stats.kstest(columns, "uniform").pvalue > 0.001  # the answer is an uninformed one


def split_at(tokens, piece):
    """What stands before and behind the first place of a piece."""
    place = next(i for i in range(len(tokens)) if tokens[i : i + len(piece)] == piece)
    return tokens[:place], tokens[place + len(piece) :]


def test_behaviour_tokens_stand_in_about_half_of_the_documents_and_are_never_an_answer(documents):
    marked = []
    for row in range(len(documents)):
        read, learned, _ = parts(documents, row)
        kind = kind_of(documents, read, learned)
        if kind in ("list", "choice"):
            marked.append(documents.prompts.item_token in read)
            assert documents.prompts.item_token not in learned
    assert 0.4 < np.mean(marked) < 0.6


def test_a_document_follows_from_seed_epoch_and_row_alone(base, documents):
    def again(seed=0, epoch=0):
        other = Documents(small_dataset(), documents.prompts, number=20, seed=seed)
        other.set_epoch(epoch)
        return [other[row] for row in reversed(range(20))][::-1]

    first = [documents[row] for row in range(20)]
    assert again() == first
    assert all(one != other for one, other in zip(again(seed=1), first, strict=True))
    assert all(one != other for one, other in zip(again(epoch=1), first, strict=True))
    assert len({tuple(tokens) for tokens, _ in first}) == 20


def test_with_grow_lists_are_short_at_first(documents):
    growing = Documents(small_dataset(), documents.prompts, number=200, seed=0, grow=True)

    def longest():
        lengths = []
        for row in range(200):
            read, learned, _ = parts(growing, row)
            if kind_of(growing, read, learned) == "list" and (named := titles_in(growing, learned[:-1])):
                lengths.append(len(named))
        return max(lengths)

    assert longest() == 6
    growing.set_epoch(1)
    assert 6 < longest() <= 10
    growing.set_epoch(7)
    assert 18 < longest() <= LONGEST_LIST


def test_no_document_is_learned_from_nothing_where_items_have_no_text(documents):
    bare = Documents(small_dataset(text=False), documents.prompts, number=300, seed=0)
    kinds = Counter(kind_of(bare, *parts(bare, row)[:2]) for row in range(300))
    assert set(kinds) >= {"history", "list", "choice"}
    about, learned = bare._about(np.random.default_rng(0))
    assert learned == [] and about[0] == documents.prompts.tokenizer.bos_token_id


def test_public_readers_are_in_no_data_set():
    public = language_model.public_library.__wrapped__ if hasattr(language_model.public_library, "__wrapped__") else None
    assert public is None  # made anew, not kept
    world = make_world(users=50, conflict=0.0, seed=1_000_000)
    other = make_world(users=50, conflict=0.0, seed=0)
    assert not world.events["item"].equals(other["item"] if isinstance(other, dict) else other.events["item"])


# ---------------------------------------------------------------- pretraining


def test_the_loss_is_next_token_cross_entropy_at_the_labels(base, documents):
    training = Pretraining(base[0])
    rows = [documents[row] for row in range(5)]
    losses, count = 0.0, 0
    with torch.no_grad():
        for tokens, labels in rows:
            logits = base[0](torch.tensor([tokens])).logits[0]
            for place, label in enumerate(labels[1:]):
                if label != NO_LABEL:
                    losses += functional.cross_entropy(logits[place], torch.tensor(label))
                    count += 1
        found = training(training.collate(rows))
    torch.testing.assert_close(found, losses / count, rtol=1e-5, atol=1e-5)
    batch = training.collate(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(map(training.length, rows)))


def test_a_warm_start_keeps_the_embeddings_of_shared_tokens(base):
    old_model, old = base
    tokenizer = language_model.train_tokenizer(
        list(wording("film", "watched")), [" Granite Voyage", " Zebra Quixote", " a mountain film"]
    )
    model = language_model.LlamaForCausalLM(language_model._config())
    language_model._take_over(model, tokenizer, EMBEDDED)
    new, kept = model.get_input_embeddings().weight, old_model.get_input_embeddings().weight
    shared = set(tokenizer.get_vocab()) & set(old.get_vocab())
    assert {"<s>", "</s>", ITEM_TOKEN, "ĠThe", "ĠVoyage"} <= shared
    rows = [[vocabulary.get_vocab()[token] for token in sorted(shared)] for vocabulary in (tokenizer, old)]
    assert rows[0] != rows[1]
    assert torch.equal(new[rows[0]], kept[rows[1]])
    assert torch.equal(new.sum(1).sort().values, kept.sum(1).sort().values)  # every row once: the rest inherit
    frozen = {name: value for name, value in old_model.state_dict().items() if "embed" not in name and "head" not in name}
    assert frozen and all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return tmp_path


def test_a_base_for_other_data_is_made_once_and_loads(home, monkeypatch):
    dataset = small_dataset()
    folder = language_model.base_for(dataset, documents=32, device="cpu")
    assert folder.is_relative_to(home) and not list((home / "unfinished").glob("*"))
    model, tokenizer = load_language_model(str(folder), device="cpu")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = tokenizer(" Granite Summit", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == " Granite Summit" and tokenizer.convert_tokens_to_ids(ITEM_TOKEN) == 3
    monkeypatch.setattr(language_model, "pretrain", lambda *args, **kwargs: pytest.fail("trained again"))
    assert language_model.base_for(dataset, documents=32, device="cpu") == folder


def test_pretraining_is_the_same_twice(home):
    weights = []
    for name in ("one", "two"):
        language_model.pretrain(small_dataset(), home / name, home / f"{name}-work", 16, batch_size=8, epochs=1, device="cpu")
        weights.append(load_language_model(str(home / name), device="cpu")[0].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_the_embedded_base_serves_the_world_and_other_data_get_their_own(base, world, monkeypatch):
    monkeypatch.setattr(language_model, "base_for", lambda dataset, **_: pytest.fail("made a base for the world"))
    model, _ = load_language_model("embedded", world, device="cpu")
    assert torch.equal(model.lm_head.weight, base[0].lm_head.weight)
    asked = []
    monkeypatch.setattr(language_model, "base_for", lambda dataset, **_: asked.append(dataset.name) or EMBEDDED)
    load_language_model("embedded", small_dataset(), device="cpu")
    assert asked == ["small"]


# ---------------------------------------------------------------- projector


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_projector_starts_near_the_placeholder_whatever_the_scale(scale):
    torch.manual_seed(0)
    embeddings, placeholder = scale * torch.randn(50, 64), torch.randn(128)
    projector = Projector(embeddings, placeholder)
    found = projector(embeddings)
    assert found.shape == (50, 128)
    apart = (found - placeholder).norm(dim=1) / placeholder.norm()
    assert 0.01 < apart.mean() < 0.6  # near, but every item another
    assert torch.pdist(found).min() > 1e-3
