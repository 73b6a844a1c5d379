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
from ilora.language.pretraining import (
    EMBEDDED,
    LONGEST_LIST,
    OTHER_DATA,
    VOCABULARY,
    Documents,
    Pretraining,
    train_tokenizer,
)


def arguments_of_the_embedded_model(users="20_000"):
    """The arguments of `pretrain` in the code of the embedded model's README, with other readers."""
    code = re.search(r"```python\n(.*?)```", (EMBEDDED / "README.md").read_text("utf-8"), re.S).group(1)
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "pretrain", lambda *arguments: given.extend(arguments))
        exec(code.replace("20_000", users), {})
    return given


PUBLIC = arguments_of_the_embedded_model(users="40")[3]
RECIPES = {"public": PUBLIC, "other data": OTHER_DATA}


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


def documents_of(base, recipe, number=400, dataset=None):
    dataset = dataset or small_dataset()
    prompts = Prompts(base[1], list(dataset.items["title"]), dataset.noun, dataset.verb)
    return Documents(dataset, prompts, number, seed=0, recipe=recipe)


@pytest.fixture(scope="module", params=RECIPES.values(), ids=list(RECIPES))
def documents(base, request):
    return documents_of(base, request.param)


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


def test_documents_are_of_four_kinds_of_which_three_are_common(documents):
    kinds = Counter(kind_of(documents, *parts(documents, row)[:2]) for row in range(len(documents)))
    assert sum(kinds.values()) == 400 and 1 <= kinds["about"] <= 25
    assert all(60 <= kinds[kind] <= 240 for kind in ("history", "list", "choice"))


def test_labels_are_the_last_tokens_themselves_and_never_the_question(documents):
    for row in range(len(documents)):
        tokens, labels = documents[row]
        read, learned, labelled = parts(documents, row)
        assert len(tokens) == len(labels) and labelled == learned and len(learned) > 0 and len(read) > 0
        assert NO_LABEL not in labelled and read[0] == documents.prompts.tokenizer.bos_token_id


def titles_in(documents, tokens):
    """Titles of a list of real titles; None for made-up ones."""
    known = {
        tuple(answer): title for answer, title in zip(documents.prompts.answers, documents.prompts.titles, strict=True)
    }
    names, piece = [], []
    for token in [*[t for t in tokens if t != documents.prompts.item_token], *documents.prompts.separator]:
        if [token] == documents.prompts.separator:
            names.append(known.get(tuple(piece)))
            piece = []
        else:
            piece.append(token)
    return None if None in names else names


def test_each_kind_is_learned_where_there_is_something_to_learn(documents):
    prompts, real, columns, total = documents.prompts, Counter(), [], 0
    answers_read, recipe = [], documents.recipe
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
            total += 1
            before, offered = split_at(read, prompts.offer)
            assert offered[-len(prompts.question) :] == prompts.question
            offered = titles_in(documents, offered[: -len(prompts.question)])
            if kind == "choice":  # its history is invented, too, or of a training user
                history = titles_in(documents, before[len(prompts.opening) :])
                assert history is None if offered is None else 3 <= len(history) <= 10 and set(history) <= train
            if offered is None:
                continue
            named = titles_in(documents, learned[:-1])
            real[kind] += 1
            if kind == "list":
                assert Counter(named) == Counter(offered)
            else:
                assert len(named) == 1 and named[0] in offered
                columns.append((offered.index(named[0]) + 0.5) / len(offered))
                answers_read.append(named[0] in history)
    assert min(real["list"], real["choice"]) > 20
    share = (real["list"] + real["choice"]) / total
    assert 0.4 < share < 0.6 if recipe.invented else share == 1
    assert stats.kstest(columns, "uniform").pvalue > 0.001  # the place of the answer tells nothing
    spotted = recipe.spotted + (1 - recipe.spotted) * 8 / 40
    assert np.mean(answers_read) == pytest.approx(spotted, abs=0.15)  # where it is not spotted, reading tells nothing


def split_at(tokens, piece):
    """The tokens before and after the first occurrence of a piece."""
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
        other = Documents(small_dataset(), documents.prompts, number=20, seed=seed, recipe=documents.recipe)
        other.set_epoch(epoch)
        return [other[row] for row in reversed(range(20))][::-1]

    first = [documents[row] for row in range(20)]
    assert again() == first
    assert all(one != other for one, other in zip(again(seed=1), first, strict=True))
    assert all(one != other for one, other in zip(again(epoch=1), first, strict=True))
    assert len({tuple(tokens) for tokens, _ in first}) == 20


def test_lists_that_grow_are_short_at_first(documents):
    def longest():
        lengths = []
        for row in range(len(documents)):
            read, learned, _ = parts(documents, row)
            if kind_of(documents, read, learned) == "list" and (named := titles_in(documents, learned[:-1])):
                lengths.append(len(named))
        return max(lengths)

    try:
        longest_lists = [longest() for epoch in (0, 1, 7) if documents.set_epoch(epoch) is None]
    finally:
        documents.set_epoch(0)
    if documents.recipe.grow:
        assert longest_lists[0] == 6 < longest_lists[1] <= 10 < longest_lists[2] <= LONGEST_LIST
    else:
        assert all(18 < length <= LONGEST_LIST for length in longest_lists)


def offers(documents):
    """(history, offered titles, answer) of each choice, as token lists without behaviour tokens."""
    prompts = documents.prompts
    for row in range(len(documents)):
        read, learned, _ = parts(documents, row)
        if kind_of(documents, read, learned) == "choice":
            before, after = split_at([token for token in read if token != prompts.item_token], prompts.offer)
            listed = pieces(prompts, before[len(prompts.opening) :]), pieces(prompts, after[: -len(prompts.question)])
            yield *listed, learned[:-1]


def pieces(prompts, tokens):
    """Titles of a joined list, whether known or invented; no invented title here holds the separator."""
    titles = [[]]
    for token in tokens:
        if [token] == prompts.separator:
            titles.append([])
        else:
            titles[-1].append(token)
    return titles


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_spotted_title_is_the_one_offered_title_that_was_read_and_the_answer(base, recipe):
    documents = documents_of(base, replace(recipe, shares=(0, 0, 0, 1), spotted=1.0, grow=False))
    known, places, lengths, invented = documents.prompts.answers, [], Counter(), 0
    for history, offered, answer in offers(documents):
        assert {tuple(title) for title in offered if title in history} == {tuple(answer)}
        places.append((offered.index(answer) + 0.5) / len(offered))
        lengths[len(offered)] += 1
        invented += answer not in known
    assert len(places) == 400 and len(lengths) > 15 and max(lengths) <= LONGEST_LIST
    assert stats.kstest(places, "uniform").pvalue > 0.001
    assert 150 < invented < 250 if recipe.invented else invented == 0


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_share_of_choices_is_spotted_and_the_rest_left_to_chance(base, recipe):
    documents = documents_of(base, replace(recipe, shares=(0, 0, 0, 1), invented=False))
    choices = list(offers(documents))
    one = [[title for title in offered if title in history] == [answer] for history, offered, answer in choices]
    assert len(choices) == 400 and recipe.spotted - 0.07 < np.mean(one) < recipe.spotted + 0.12
    assert any(answer not in history for history, _, answer in choices)


def test_a_small_catalogue_is_offered_whole(base):
    few = small_dataset()
    recipe = replace(OTHER_DATA, shares=(0, 0, 0, 1), spotted=0.0)
    few = replace(few, items=few.items.head(20), events=few.events[few.events["item"] < 20])
    longest = max(len(offered) for _, offered, _ in offers(documents_of(base, recipe, dataset=few)))
    assert longest == 20


def test_invented_titles_are_made_of_the_whole_vocabulary(base):
    documents = documents_of(base, PUBLIC)
    drawn, known = [], {token for title in documents.prompts.answers for token in title}
    for row in range(100):
        for title in documents._some_titles(np.random.default_rng(row), 10)[0]:
            drawn += title
    assert 3 < min(drawn) < max(drawn) < VOCABULARY  # never a special token
    assert len(set(drawn)) > 500 and len(set(drawn) - known) > 400


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_without_further_text_documents_are_of_the_other_kinds(base, recipe):
    bare = documents_of(base, recipe, number=300, dataset=small_dataset(text=False))
    kinds = Counter()
    for row in range(300):
        read, learned, _ = parts(bare, row)
        assert len(learned) > 0
        kinds[kind_of(bare, read, learned)] += 1
    assert set(kinds) == {"history", "list", "choice"} and min(kinds.values()) > 40


def test_documents_are_about_the_items_that_have_text_alone(base):
    dataset = small_dataset()
    few = dataset.items.assign(text=["", "two\n lines ", " ", "drama"] + [""] * 36)
    documents = documents_of(base, replace(PUBLIC, shares=(0, 1, 0, 0)), 40, replace(dataset, items=few))
    seen = {
        (base[1].decode(read[1:-1]), base[1].decode(learned))
        for read, learned, _ in (parts(documents, row) for row in range(40))
    }
    known = [f" {title}" for title in few["title"]]
    assert seen == {(known[1], " two lines"), (known[3], " drama")}


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
        loss = training(training.collate(rows))
    torch.testing.assert_close(loss, losses / count, rtol=1e-5, atol=1e-5)
    batch = training.collate(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(map(training.length, rows)))


def test_a_warm_start_keeps_the_embeddings_of_shared_tokens(base):
    old_model, old = base
    texts = [" Granite Voyage", " Zebra Quixote", " a mountain film"]
    tokenizer = train_tokenizer(list(wording("film", "watched")), texts, PUBLIC)
    torch.manual_seed(0)
    model = pretraining.LlamaForCausalLM(pretraining.llama_config(replace(PUBLIC, vocabulary=5000)))
    pretraining.copy_weights(model, tokenizer, EMBEDDED)
    new, kept = model.get_input_embeddings().weight, old_model.get_input_embeddings().weight
    shared = sorted(set(tokenizer.get_vocab()) & set(old.get_vocab()))
    assert {"<s>", "</s>", ITEM_TOKEN, "Ġnext", "ĠVoyage"} <= set(shared)
    rows = [[vocabulary.get_vocab()[token] for token in shared] for vocabulary in (tokenizer, old)]
    assert rows[0] != rows[1] and len(new) == 5000
    assert torch.equal(new[rows[0]], kept[rows[1]])
    others = new[sorted(set(range(5000)) - set(rows[0]))]
    assert others.std().item() == pytest.approx(kept.std().item(), rel=0.05)  # the rest have the same scale
    inner = {name: value for name, value in old_model.state_dict().items() if ".layers." in name or "norm" in name}
    assert len(inner) == 37 and all(torch.equal(model.state_dict()[name], value) for name, value in inner.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_only_the_tokens_of_other_data_span_words():
    prompts, texts = list(wording("film", "watched")), [" Granite Voyage"] * 3
    plain, spanning = (train_tokenizer(prompts, texts, recipe) for recipe in (PUBLIC, OTHER_DATA))
    assert "ĠGraniteĠVoyage" in spanning.get_vocab()
    assert not [token for token in plain.get_vocab() if "Ġ" in token[1:].lstrip("Ġ")]
    small = train_tokenizer(prompts, texts, replace(PUBLIC, vocabulary=300))
    assert len(small) == 300 < len(plain)
    for tokenizer in (plain, spanning, small):
        assert tokenizer.decode(tokenizer(" Granite Voyage é").input_ids) == " Granite Voyage é"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    return tmp_path


def test_a_base_for_other_data_is_made_once_and_loads(home, monkeypatch):
    dataset = small_dataset()
    recipe = replace(OTHER_DATA, documents=32, batch_size=8)
    folder = pretraining.base_for(dataset, device="cpu", recipe=recipe)
    assert folder.is_relative_to(home) and not list((home / "training").glob("*"))
    model, tokenizer = load_language_model(str(folder), device="cpu")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = tokenizer(" Granite Summit", add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == " Granite Summit" and tokenizer.convert_tokens_to_ids(ITEM_TOKEN) == 3
    monkeypatch.setattr(pretraining, "pretrain", lambda *args, **kwargs: pytest.fail("trained again"))
    assert pretraining.base_for(dataset, device="cpu", recipe=recipe) == folder
    for change in ({"seed": 1}, {"recipe": replace(recipe, spotted=0.6)}):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            pretraining.base_for(dataset, **({"device": "cpu", "recipe": recipe} | change))


def test_pretraining_is_the_same_twice(home):
    weights, recipe = [], replace(PUBLIC, documents=16, batch_size=8, epochs=2)
    for name in ("one", "two"):
        pretraining.pretrain(small_dataset(), home / name, home / f"{name}-work", recipe, device="cpu")
        weights.append(load_language_model(str(home / name), device="cpu")[0].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_the_embedded_model_is_made_from_readers_without_conflict():
    library, folder, work, _ = arguments_of_the_embedded_model(users="30")
    assert len(library.users) == 30 and set(library.users["split"]) == {"train"} and folder != work
    assert set(library.events["user"]) == set(library.users["user"])
