"""The pages before the chapters: the code of `forty_lines` agrees with the package; pictures are up to date."""

import ast
import builtins
import json
import re
import runpy

import nbformat
import pytest
import torch
from conftest import ROOT
from peft import get_peft_model
from torch import nn

from ilora import ILoraConfig
from ilora.study import figures

ASSETS = ROOT / "book" / "assets"
TASK = {"prompt", "readers"}  # functions that make the page's toy questions


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ASSETS / "forty_lines.py"))


@pytest.fixture(scope="module")
def names(script):
    """What the blocks of the page leave; their own assertions hold."""
    return script["run_page"]()


def test_the_method_has_forty_lines():
    page = (ROOT / "book" / "forty_lines.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    lines, counted = code.splitlines(), 0
    assert max(map(len, lines)) <= 76
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in TASK:
            counted += sum(bool(line.strip()) for line in lines[node.lineno - 1 : node.end_lineno])
    assert counted == 40


def test_its_layer_computes_what_the_package_computes(names):
    layer, x, z = names["layer"], names["x"], torch.randn(3, 64)
    config = ILoraConfig(r=8, lora_alpha=32, num_experts=4, target_modules=["0"], task_type=None)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)).requires_grad_(False), config)
    adapted = model.base_model.model[0]
    adapted.base_layer, adapted.lora_A["default"], adapted.lora_B["default"] = layer.base, layer.A, layer.B
    layer.gate.W_g = model.base_model.lora_gate["default"].W_g
    layer.gate(z)
    torch.testing.assert_close(model(x, sequence_embeds=z), layer(x), atol=1e-4, rtol=1e-4)


def test_its_candidates_are_twenty_different_items_outside_the_history(names):
    history = torch.tensor([4, 5, 6])
    offered = names["candidates"](history, 7).tolist()
    assert len(set(offered)) == 20 and 7 in offered
    assert not {4, 5, 6} & set(offered)


def test_its_pictures_are_drawn_from_its_code(script, names):
    figures.style()
    for name in ("factors", "updates", "tokens", "curriculum"):
        committed = (ASSETS / f"forty_{name}.svg").read_text(encoding="utf-8")
        drawn = figures.svg(script[name](names))
        assert without_images(committed) == without_images(drawn), "run python book/assets/forty_lines.py"
    (title,) = script["ranking"](names).axes  # the training's last digits differ between machines
    assert title.get_title(loc="left") in (ASSETS / "forty_ranking.svg").read_text(encoding="utf-8")


def without_images(svg):
    return re.sub(r'"data:image/png;base64,[^"]*"', '""', svg)


def test_the_pictures_of_the_idea_are_what_their_script_draws():
    drawing = runpy.run_path(str(ASSETS / "idea.py"))
    for name, draw in (("idea", "wide"), ("idea_tall", "tall"), ("idea_gradients", "gradients")):
        committed = (ASSETS / f"{name}.svg").read_text(encoding="utf-8")
        assert committed == drawing[draw](), "run python book/assets/idea.py"


def test_the_gate_hardly_separates_the_true_groups_as_the_first_pages_say():
    result = json.loads((ROOT / "book" / "results" / "06_gradients.json").read_text(encoding="utf-8"))
    assert 0 <= result["metrics"]["gate"]["between groups"]["value"] < 0.05


def test_text_in_the_pictures_has_nine_pixels_on_a_phone():
    pictures = [path for path in ASSETS.glob("*.svg") if path.name not in ("idea.svg", "favicon.svg")]
    assert len(pictures) == 7
    for path in pictures:
        svg = path.read_text(encoding="utf-8")
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?([\d.]+)px", svg)]
        assert min(sizes) * 342 / width >= 9, path.name  # the text column of a phone that is 390 pixels wide


def test_the_first_page_lists_the_chapters_with_their_questions():
    page = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d)\. (.*)\]\((\w+)\.ipynb\) \| (.*) \|$", page, re.M)
    assert len(rows) == 8
    for number, title, name, question in rows:
        heading, _, subtitle, *_ = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells[0].source.splitlines()
        assert (heading, subtitle, int(name[:2])) == (f"# {title}", f"*{question}*", int(number))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_each_exercise_is_for_paper_or_says_how_to_run_its_notebook(path):
    """A solution that uses names of the chapter is announced; at least one exercise needs none of them."""
    cells = nbformat.read(path, 4).cells
    chapter = {node.id for cell in cells if cell.cell_type == "code" for node in names_in(cell.source)}
    (text,) = (cell.source for cell in cells if cell.cell_type == "markdown" and "{admonition} Solution" in cell.source)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    running = [block for block in blocks if chapter & ({node.id for node in names_in(block)} - defined_in(block))]
    announced = text.count(f"*Needs the notebook running:* `.venv/bin/jupyter lab notebooks/{path.name}`")
    assert announced == len(running) < text.count("{admonition} Solution")


def names_in(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]


def defined_in(source):
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    aliases = {alias.asname or alias.name for node in imported for alias in node.names}
    return aliases | {node.id for node in names_in(source) if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
