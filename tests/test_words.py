"""What the pages in words tell a reader to type: Python that runs, commands and parameters that exist."""

import functools
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ilora import data
from ilora.errors import UserError
from ilora.language.pretraining import EMBEDDED
from ilora.study import parameters

PAGES = sorted((ROOT / "book").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(page, language):
    text = (ROOT / ("" if page == "README" else "book") / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ILORA_HOME", str(tmp_path / "artifacts"))
    return tmp_path


def test_the_code_on_the_page_of_the_adapter_runs(somewhere, monkeypatch):
    """On the embedded model, in the place of the large one."""
    model_of, tokenizer_of = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model_of(EMBEDDED, dtype=torch.float32)
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _, **given: tokenizer_of(EMBEDDED, **given))
    here, (first, *code) = {}, blocks("adapter", "python")
    assert len(code) == 8
    exec(first, here)
    for name, matrix in here["model"].named_parameters():
        if "lora_B" in name:  # zero, so that nothing below would differ from the base
            torch.nn.init.normal_(matrix, std=0.05)
    for block in code:
        exec(block, here)
    torch.testing.assert_close(here["weights"].sum(1), torch.ones(2))
    assert here["weights"].shape == (2, 4)
    z, batch, model = here["z"], here["batch"], here["model"]
    with torch.no_grad():
        one_user = model(**batch, sequence_embeds=z[:1].expand(2, -1)).logits
        assert (one_user - AutoModelForCausalLM.from_pretrained()(**batch).logits).abs().max() > 0.1
        torch.testing.assert_close(here["merged"], one_user, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(here["plain"](**batch).logits, one_user, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model(**batch, sequence_embeds=z).logits, here["logits"], atol=1e-3, rtol=1e-3)
    assert here["sparse"].gate_top_k == 2
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(), here["config"])
    train_with_trainer(fresh, here["collate"], somewhere)


def train_with_trainer(model, collate, folder):
    """Three steps of transformers' Trainer with the page's collator moves the adapter and its gate."""
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids, "sequence_embeds": torch.randn(64).tolist()}
        for ids in ([5, 6, 7], [8, 9])
    ]
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    arguments = TrainingArguments(folder, max_steps=3, remove_unused_columns=False, use_cpu=True, report_to="none")
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    moved = {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}
    assert any("lora_B" in name for name in moved) and any("lora_gate" in name for name in moved)


def test_the_code_on_the_page_of_own_data_runs_and_its_folder_is_read(somewhere):
    here, code = {}, blocks("own_data", "python")
    assert len(code) == 2
    for block in code:
        exec(block, here)
    assert here["mine"].noun == "film" and here["mine"].name == "csv"
    world = data.load("world", users=120)
    assert len(here["mine"].events) == len(world.events)
    assert list(here["mine"].items["title"]) == list(world.items["title"])


def test_the_files_on_the_page_of_own_data_are_of_the_form_it_describes(somewhere):
    """The excerpts alone are too few to learn from, and that is all that is wrong with them."""
    events, items = blocks("own_data", "text")
    (somewhere / "events.csv").write_text(events)
    (somewhere / "items.csv").write_text(items)
    with pytest.raises(UserError, match="csv has 2 items, but each question offers 20"):
        data.load("csv", str(somewhere))


def commands():
    for page in ("README", *(page.stem for page in PAGES)):
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            yield from ((page, command) for line in lines if (command := shlex.split(line, comments=True)))


@functools.cache
def explained(*command):
    """What this command of ours says of itself, before any work."""
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_names_what_is_there(page, command):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", MAKEFILE, re.M)
    for word in command:
        if word.startswith("notebooks/"):
            assert (ROOT / word).is_file()
    if "-m" in command and command[2].startswith("ilora"):
        about = explained(*command[1 : 4 if {"table", "sweep"} & set(command) else 3])
        assert all(re.search(rf"{word}\b", about) for word in command if word.startswith("--"))
    given = [(command[at + 1], command[at + 2]) for at, word in enumerate(command) if word == "-p"]
    given = [pair for pair in given if pair[0] != "data_dir"]  # a folder of the reader's
    if ("dataset", "csv") in given:
        given.remove(("dataset", "csv"))  # which needs one
    parameters.parse_parameters(given)


def test_files_that_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"`((?:ilora|notebooks|book|tests)/[\w/.]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file() or "NN_name" in name, (page.name, name)


def test_a_quantised_base_becomes_a_recommender_as_the_page_of_gpus_says(somewhere, monkeypatch):
    """The block as it stands, on a CPU: a random Llama whose layers fill whole blocks of 64 weights, and the world."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the quantised base is not tried")
    model_of, tokenizer_of = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def load(_, quantization_config, device_map):
        assert quantization_config.load_in_4bit and device_map == {"": 0}
        return model_of(somewhere / "base", quantization_config=quantization_config, device_map="cpu")

    shape = AutoConfig.from_pretrained(EMBEDDED)
    shape.intermediate_size = 128
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(somewhere / "base")

    world = data.load("world", users=120)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: tokenizer_of(EMBEDDED))
    monkeypatch.setattr(data, "load", lambda _: world)
    here, (block,) = {}, [block for block in blocks("own_gpus", "python") if "load_in_4bit" in block]
    exec(block, here)
    model, asked = here["model"], data.questions(world, "train", limit=4)
    rows = [asked[row] for row in range(4)]
    model(model.collate(rows)).backward()
    assert any(value.grad is not None and value.grad.abs().max() > 0 for value in model.parameters())
    assert model.eval().rank(rows).shape == (4, data.CANDIDATES)
