import re
import time
import unicodedata
from itertools import chain

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ilora.errors import UserError
from ilora.language import ITEM_TOKEN, NO_LABEL, PROMPT, Prompts, prompt_text, read_answer, wording

TITLES = ["Mossy Oak", "The Neon Market, part 2", "Ill", "Salted: a tale", "Oak"]


def byte_level(*special, texts=()):
    """A byte-level BPE in the manner of GPT-2, which has seen `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TITLES, *wording("story", "read"), *texts] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sentence_piece():
    """A BPE in the manner of Llama-2: spaces are letters, and each text gets one in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n", ";"], show_progress=False
    )
    words = [word for text in [*TITLES, *wording("story", "read")] for word in text.replace(".", " . ").split()]
    tokenizer.train_from_iterator([*words, *TITLES] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def prompts():
    return Prompts(byte_level(ITEM_TOKEN), TITLES, "story", "read")


def text_of(history, candidates, mark=""):
    opening, offer, question = wording("story", "read")
    listed = [";".join(f" {TITLES[item]}{mark}" for item in items) for items in (history, candidates)]
    return f"{opening}{listed[0]}{offer}{listed[1]}{question}"


# ---------------------------------------------------------------- tokens


# The last has merged a colon with what follows it here: the pieces' first sign must not get lost.
@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), byte_level(texts=["a:. b", "a:; b", "x:;y", "A; B.", "A.B;C"]), sentence_piece()],
    ids=["bytes", "merged signs", "spaces are letters"],
)
def test_pieces_join_to_the_tokens_of_the_whole_text(tokenizer):
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    history, candidates = [0, 3, 2], [4, 1, 0]
    tokens = prompts.write(history, candidates, hybrid=False)
    whole = tokenizer(text_of(history, candidates), add_special_tokens=False).input_ids
    assert tokens == [tokenizer.bos_token_id, *whole]


def test_the_answer_continues_the_prompt_as_text_does(prompts):
    whole = prompts.tokenizer(text_of([0, 1], [2, 3]) + f" {TITLES[3]}", add_special_tokens=False).input_ids
    tokens = prompts.write([0, 1], [2, 3], hybrid=False)
    assert tokens[1:] + prompts.answers[3] == whole


def test_a_prompt_reads_as_meant(prompts):
    tokens = prompts.write([0, 1], [2, 3], hybrid=True)
    assert prompts.tokenizer.decode(tokens) == "<s>" + text_of([0, 1], [2, 3], mark=ITEM_TOKEN)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()], ids=["bytes", "spaces are letters"])
def test_a_tokenizer_without_the_item_token_gets_one_and_stays_as_it_is(tokenizer):
    size = len(tokenizer)
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    assert not prompts.has_item_token and len(tokenizer) == size
    assert prompts.item_token not in (tokenizer.eos_token_id, tokenizer.unk_token_id)
    tokens = prompts.write([0, 1], [2, 3], hybrid=True)
    assert prompts.end not in tokens
    assert prompts.tokenizer.decode(tokens).count(ITEM_TOKEN) == 4
    known = Prompts(byte_level(ITEM_TOKEN), TITLES, "story", "read")
    assert known.has_item_token and known.tokenizer.convert_ids_to_tokens(known.item_token) == ITEM_TOKEN


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        Prompts(tokenizer, TITLES, "story", "read")


# ---------------------------------------------------------------- titles that read back

ODD = {
    "a line break": "Alien\nResurrection",
    "other breaks": "Up\u2028and\x0bdown",
    "white space": "  Two\t words \u00a0 and a space ",
    "NFD": unicodedata.normalize("NFD", "Amélie à la Noël"),
    "signs": 'Who ? n\'t "so" , $$ <b> 100 % ...',
    "other letters": "七人の侍 🎬",
}


@pytest.mark.parametrize("title", ODD.values(), ids=ODD)
def test_an_odd_title_reads_back_as_itself_and_not_as_another(title):
    titles = ["Alien", "Up", "Two", title, "Amelie a la Noel", "Resurrection"]
    prompts = Prompts(byte_level(), titles, "film", "watched")
    for item, answer in enumerate(prompts.answers):
        assert read_answer(prompts.read([*answer, prompts.end]), prompts.titles) == item
        assert read_answer(prompts.read(answer), titles) == item
    assert not any(len(title.splitlines()) > 1 for title in prompts.titles)


@pytest.mark.parametrize(
    ("tokenizer", "title"),
    [
        (byte_level(), "An </s> within"),  # a special token is not written
        (byte_level(), " "),
        (byte_level(), "oak"),  # as another one, but for case
        (sentence_piece(), "Œuvre №5"),  # letters that it does not know
    ],
)
def test_titles_that_do_not_read_back_are_refused_by_name(tokenizer, title):
    with pytest.raises(UserError, match=re.escape(repr(title.strip()))):
        Prompts(tokenizer, [*TITLES, title], "story", "read")
    with pytest.raises(UserError, match=r"^3 of 8 titles .*'B</s>', 'C</s>', 'D</s>': "):
        Prompts(byte_level(), [*TITLES, "B</s>", "C</s>", "D</s>"], "story", "read")


def test_thousands_of_titles_are_checked_in_a_moment():
    began = time.perf_counter()
    Prompts(byte_level(), [f"Title {number} of a long list" for number in range(5000)], "story", "read")
    assert time.perf_counter() - began < 5  # about 0.5 s; each against all would take minutes


def test_a_tokenizer_without_a_start_token_begins_with_the_text():
    tokenizer = byte_level()
    tokenizer.bos_token = None
    tokens = Prompts(tokenizer, TITLES, "story", "read").write([0], [1], hybrid=False)
    assert tokens == tokenizer(text_of([0], [1]), add_special_tokens=False).input_ids


# ---------------------------------------------------------------- item tokens


def test_the_item_token_follows_each_title(prompts):
    history, candidates = [4, 0], [2, 1, 4]
    tokens = prompts.write(history, candidates, hybrid=True)
    places = [place for place, token in enumerate(tokens) if token == prompts.item_token]
    assert len(places) == 5
    for place, item in zip(places, history + candidates, strict=True):
        title = prompts.answers[item]
        assert tokens[place - len(title) : place] == title


def test_a_text_only_prompt_has_no_item_tokens(prompts):
    assert prompts.item_token not in prompts.write([0, 1], [2, 3], hybrid=False)
    batch = prompts.batch([[0, 1]], [[2, 3]], hybrid=False)
    assert len(batch["items"]) == len(batch["places"]) == 0


# ---------------------------------------------------------------- batches


def test_prompts_alone_are_padded_on_the_left(prompts):
    histories, candidates = [[2], [0, 1, 3, 4], [2, 2]], [[0, 1], [1, 0], [4, 2]]
    batch = prompts.batch(histories, candidates)
    assert batch["labels"].shape == (3, 0)
    for row, (history, offered) in enumerate(zip(histories, candidates, strict=True)):
        tokens = prompts.write(history, offered, hybrid=True)
        padding = batch["input_ids"].shape[1] - len(tokens)
        assert batch["input_ids"][row].tolist() == [0] * padding + tokens
        assert (batch["part"][row] == PROMPT).tolist() == [False] * padding + [True] * len(tokens)
    assert (batch["part"] == PROMPT).all(1).sum() == 1


@pytest.mark.parametrize("answers", [(), [[1, 2, 0], [4]]])
def test_a_batch_says_where_the_token_of_each_item_is(prompts, answers):
    histories, candidates = [[0], [3, 4, 1]], [[1, 2], [0, 2]]
    batch = prompts.batch(histories, candidates, answers)
    assert batch["items"].tolist() == [0, 1, 2, 3, 4, 1, 0, 2]
    assert (batch["input_ids"].flatten()[batch["places"]] == prompts.item_token).all()
    assert (batch["input_ids"] == prompts.item_token).sum() == len(batch["places"]) == 8
    before = batch["input_ids"].flatten()[batch["places"] - 1]  # the last token of each title
    assert before.tolist() == [prompts.answers[item][-1] for item in batch["items"].tolist()]


@pytest.mark.parametrize("hybrid", [True, False])
def test_each_answer_follows_the_prompt_and_padding_is_on_the_right(prompts, hybrid):
    histories, candidates, answers = [[0], [3, 4, 1]], [[1, 2], [0, 2]], [[1, 2, 0], [4]]
    batch = prompts.batch(histories, candidates, answers, hybrid)
    for row, items in enumerate(answers):
        tokens = prompts.write(histories[row], candidates[row], hybrid)
        titles = [prompts.answers[item] for item in items]
        padding = [0] * (batch["input_ids"].shape[1] - len(tokens) - sum(map(len, titles)))
        assert batch["input_ids"][row].tolist() == [*tokens, *chain(*titles), *padding]
        in_prompt = batch["part"][row] == PROMPT
        assert in_prompt.sum() == len(tokens) and in_prompt[: len(tokens)].all()
        for column, title in enumerate(titles):
            learned = batch["column"][row] == column
            at, place = batch["at"][row][learned], (batch["part"][row] == column).nonzero()[:, 0]
            assert batch["labels"][row][learned].tolist() == [*title, prompts.end]
            assert at.tolist() == [len(tokens) - 1, *place.tolist()]
            assert batch["input_ids"][row][place].tolist() == title
        assert (batch["labels"][row] != NO_LABEL).sum() == sum(len(title) + 1 for title in titles)


def test_a_list_may_be_empty(prompts):
    batch = prompts.batch([[], [1]], [[2, 0], [3, 4]])
    opening, offer, question = wording("story", "read")
    text = f"{opening}{offer} {TITLES[2]}{ITEM_TOKEN}; {TITLES[0]}{ITEM_TOKEN}{question}"
    read = batch["input_ids"][0][batch["part"][0] == PROMPT]
    assert prompts.tokenizer.decode(read) == f"<s>{text}"
    assert prompts.write([], [2], hybrid=True) != prompts.write([], [2], hybrid=False)


def test_batches_refuse_lists_of_unlike_number(prompts):
    with pytest.raises(ValueError, match="zip"):
        prompts.batch([[0], [1]], [[1, 2]])


# ---------------------------------------------------------------- answers

OFFERED = ["Alien", "Aliens", "The  Piano", "Oak"]


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("Alien", 0),
        ("Aliens", 1),  # the first line is a title, though another one occurs in it
        (" aliens \nAlien; Oak", 1),  # what follows the first line does not count then
        ("the piano", 2),  # case and spacing aside
        ("I think it is The Piano.", 2),
        ("It is\nOak", 3),
        ("Aliens!", None),  # both Alien and Aliens occur
        ("Oak or The Piano", None),
        ("Alie", None),
        ("a story of my own", None),
        ("", None),
        (" \n ", None),
        ("Croak", 3),  # the released code's rule is about substrings
    ],
)
def test_read_answer(text, column):
    assert read_answer(text, OFFERED) == column


def test_every_offered_title_reads_as_itself():
    assert [read_answer(title, OFFERED) for title in OFFERED] == [0, 1, 2, 3]


def test_the_text_of_a_prompt_is_what_its_tokens_say():
    tokenizer = byte_level(ITEM_TOKEN)
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    for history, offered in (([0, 3], [1, 2, 4]), ([2], [0, 1])):
        titles = [[TITLES[item] for item in items] for items in (history, offered)]
        tokens = prompts.write(history, offered, hybrid=True)
        assert tokenizer.decode(tokens) == "<s>" + prompt_text(*titles, "story", "read")
        tokens = prompts.write(history, offered, hybrid=False)
        assert tokenizer.decode(tokens) == "<s>" + prompt_text(*titles, "story", "read", mark="")
