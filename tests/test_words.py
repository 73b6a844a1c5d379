"""What README and text pages tell a reader to type: Python that runs, commands and parameters that exist."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys

import pytest
import torch
from conftest import ROOT
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ilora import data
from ilora.errors import UserError
from ilora.language.base_models import QUANTIZATION
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


@pytest.fixture
def small_llama(monkeypatch):
    """Loads the embedded model and its tokenizer in the place of Llama-2-7B."""
    model_of, tokenizer_of = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model_of(EMBEDDED, dtype=torch.float32)
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _, **given: tokenizer_of(EMBEDDED, **given))


def test_the_code_in_the_readme_runs_and_its_adapter_depends_on_the_history(small_llama):
    names, (block,) = {}, blocks("README", "python")
    exec(block, names)
    for name, matrix in names["model"].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(matrix, std=0.05)
    first, second = names["model"](names["tokens"], sequence_embeds=names["z"]).logits
    assert names["logits"].shape[:2] == (2, 3) and (first - second).abs().max() > 1e-3


def test_the_code_on_the_page_of_the_adapter_runs(small_llama, somewhere):
    names, (first, *code) = {}, blocks("adapter", "python")
    assert len(code) == 8
    exec(first, names)
    for name, matrix in names["model"].named_parameters():
        if "lora_B" in name:  # zero, so that nothing below would differ from the base
            torch.nn.init.normal_(matrix, std=0.05)
    for block in code:
        exec(block, names)
    torch.testing.assert_close(names["weights"].sum(1), torch.ones(2))
    assert names["weights"].shape == (2, 4)
    z, batch, model = names["z"], names["batch"], names["model"]
    with torch.no_grad():
        one_user = model(**batch, sequence_embeds=z[:1].expand(2, -1)).logits
        assert (one_user - AutoModelForCausalLM.from_pretrained()(**batch).logits).abs().max() > 0.1
        torch.testing.assert_close(names["merged"], one_user, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(names["plain"](**batch).logits, one_user, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(model(**batch, sequence_embeds=z).logits, names["logits"], atol=1e-3, rtol=1e-3)
    assert names["sparse"].gate_top_k == 2
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(), names["config"])
    train_with_trainer(fresh, names["collate"], somewhere)


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
    names, code = {}, blocks("own_data", "python")
    assert len(code) == 2
    for block in code:
        exec(block, names)
    assert names["mine"].noun == "film" and names["mine"].name == "csv"
    world = data.load("world", users=120)
    assert len(names["mine"].events) == len(world.events)
    assert list(names["mine"].items["title"]) == list(world.items["title"])


def test_the_files_on_the_page_of_own_data_are_of_the_form_it_describes(somewhere):
    """They are refused only because they are too short to learn from."""
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
def help_text(*command):
    """What `python -m ilora` prints with `--help`, without starting Python again."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["ilora", *command, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module("ilora", run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_names_what_is_there(page, command, monkeypatch):
    anywhere = parameters.PARAMETERS["quantize"]._replace(valid={"", *QUANTIZATION}.__contains__)
    monkeypatch.setitem(parameters.PARAMETERS, "quantize", anywhere)  # as if bitsandbytes were installed
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", MAKEFILE, re.M)
    for word in command:
        if word.startswith("notebooks/"):
            assert (ROOT / word).is_file()
    if command[1:3] == ["-m", "ilora"]:
        text = help_text(*({"table", "sweep"} & set(command[3:4])))
        assert all(re.search(rf"{word}\b", text) for word in command if word.startswith("--"))
    given = [(command[at + 1], command[at + 2]) for at, word in enumerate(command) if word == "-p"]
    given = [pair for pair in given if pair[0] != "data_dir"]  # the reader's folder
    if ("dataset", "csv") in given:
        given.remove(("dataset", "csv"))  # which needs one
    parameters.parse_parameters(given)


def test_files_that_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"`((?:ilora|notebooks|book|tests)/[\w/.]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file() or "NN_name" in name, (page.name, name)


def test_percentages_are_written_in_one_way():
    """As Python formats them, 95%, and so without a space."""
    folders = {"book": "*.md", "notebooks": "*.ipynb", "ilora": "**/*.py", ".": "README.md"}
    for path in (path for folder, names in folders.items() for path in (ROOT / folder).glob(names)):
        assert not re.search(r"[\d}] %|\d percent", path.read_text(encoding="utf-8")), path
