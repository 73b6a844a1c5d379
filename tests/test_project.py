"""Project-wide checks: pins, the rooms and their order, notebooks and their copies, the book, the README."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ilora.study import benchmark_results, parameters, sweep_results, table_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "book" / "results"
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"^```\n(ilora/\n.*?)^```", README, re.M | re.S)[1]
ROOMS = [  # folders and files of the package; each may import itself and those of earlier lines
    {"errors"}, {"devices"}, {"artifacts"}, {"adapter", "data"}, {"training", "evaluation"}, {"recommenders"},
    {"language"}, {"study"},
]  # fmt: skip
FILES = sorted((ROOT / "ilora").rglob("*.py"))

names = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])


def tracked():
    """The files that git tracks; a source archive has no git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.check_output(["git", "-C", ROOT, "ls-files"], text=True).splitlines()


# ---------------------------------------------------------------- set-up


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def direct_requirements():
    everything = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(line) for group in everything for line in group]


def pins():
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M)
    return {canonicalize_name(name): version for name, version in lines}


def test_the_lock_pins_every_requirement_of_pyproject_within_its_range():
    for requirement in direct_requirements():
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(pin), f"{requirement} against {pin}: run `make lock`"


def test_the_lock_holds_pins_alone():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(lines) == len(pins())
    assert "+" not in pins()["torch"]  # a plain pin fits CPU and CUDA builds


def test_conda_installs_the_lock():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert dependencies[-1] == {"pip": ["--requirement requirements.lock", "--editable ."]}
    assert dependencies[0].split("=")[1] in project()["requires-python"]


def test_the_package_alone_needs_no_notebook_or_book_tools():
    groups = {"package": project()["dependencies"], **project()["optional-dependencies"]}
    names = {group: {Requirement(line).name.replace("-", "_") for line in lines} for group, lines in groups.items()}
    package, tools = names.pop("package"), set().union(*names.values())
    assert not package & tools
    assert imported_packages() - set(sys.stdlib_module_names) - {"ilora", "IPython"} <= package | tools


def imported_packages():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "ilora").rglob("*.py")]
    return {name.split(".")[0] for tree in trees for name in imported_names(tree)}


# ---------------------------------------------------------------- package


def imported_names(tree):
    """Dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    """`ilora.data.tables` for `ilora/data/tables.py`, `ilora.data` for `ilora/data/__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports():
    """Each module of the package -> the modules of the package that it imports."""
    modules = {name_of(path): path for path in FILES}
    for module, path in modules.items():
        names = set(imported_names(ast.parse(path.read_text(encoding="utf-8"))))
        owners = (name if name in modules else name.rpartition(".")[0] for name in names if name.startswith("ilora"))
        yield module, set(owners) - {module}


IMPORTS = dict(imports())


def room_of(module):
    """The folder or file directly under `ilora/`, or nothing for the package itself."""
    return module.removeprefix("ilora").strip(".").split(".")[0]


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_imports_only_earlier_rooms(module):
    room, others = room_of(module), {room_of(other) for other in IMPORTS[module]}
    if room == "":
        allowed = {"adapter"}
    elif room == "__main__":
        allowed = {"study"}
    elif room == "adapter":
        allowed = {"adapter", "errors"}
    else:
        place = next(place for place, rooms in enumerate(ROOMS) if room in rooms)
        allowed = {room, ""}.union(*ROOMS[:place])  # "": the version
    assert others <= allowed


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: others - {"ilora"} for module, others in IMPORTS.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_package_is_small():
    lines = {path.relative_to(ROOT / "ilora"): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > 350}
    study = sum(count for path, count in lines.items() if path.parts[0] == "study")
    assert study <= 2200
    assert sum(lines.values()) - study <= 3800


def test_the_tree_in_the_readme_names_the_rooms_in_their_order():
    rooms = re.findall(r"^  (\w+)(?:/|\.py) ", TREE, re.M)
    assert set(rooms) == {room_of(module) for module in IMPORTS} - {""} == {"__main__"}.union(*ROOMS)
    order = {room: place for place, level in enumerate([*ROOMS, {"__main__"}]) for room in level}
    assert rooms == sorted(rooms, key=order.get)


def test_the_drawing_of_the_rooms_shows_their_order():
    page = (ROOT / "book" / "contributing.md").read_text(encoding="utf-8")
    drawing = re.search(r"^```text\n(.*?)^```", page, re.M | re.S)[1]
    levels = [set(re.findall(r"\[(\w+)\]", line)) for line in drawing.splitlines()]
    assert [level for level in levels if level] == ROOMS[::-1]


# ---------------------------------------------------------------- what is tracked


def test_no_data_that_may_not_be_redistributed_is_tracked():
    forbidden = re.compile(r"(^|/)(u\.(data|item)|.*\.df|id2name\.txt|(user_(tagged)?artists.*|artists)\.dat)$")
    assert not [path for path in tracked() if forbidden.search(path)]
    assert not [path for path in tracked() if path.startswith(("artifacts/", "book/_build/"))]


def test_tracked_text_names_no_machines_folders():
    paths = [ROOT / path for path in tracked() if Path(path).suffix in {".py", ".md", ".ipynb", ".json", ".yml"}]
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work)/\w")
    assert not [path.name for path in paths if path.is_file() and machine.search(path.read_text(encoding="utf-8"))]


# ---------------------------------------------------------------- notebooks and their copies


def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(path):
    return [cell for cell in cells(path) if cell.cell_type == "code"]


@names
def test_a_source_notebook_carries_no_outputs(source):
    assert not [cell for cell in code(source) if cell.outputs or cell.execution_count]


@names
def test_the_parameters_come_first_and_are_checked_next(source):
    first, second, *_ = code(source)
    assert "parameters" in first.metadata.get("tags", [])
    given = list(parameters.notebook_parameters(source))
    assert given, "the parameters cell has nothing but `name = value  # meaning` lines"
    assert "#" in first.source
    values = {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (.*)$", first.source, re.M)}
    assert list(values) == given
    parameters.check_parameters(values)
    assert f'parameters.start("{source.stem}", globals())' in second.source


@names
def test_a_notebook_only_calls_the_package(source):
    for cell in code(source):
        plain = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        assert not [node for node in ast.walk(ast.parse(plain)) if isinstance(node, definitions)]
    assert 10 <= len(code(source)) <= 25


@names
def test_code_in_a_notebook_fits_on_a_page(source):
    lines = [line for cell in code(source) for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 76]


@pytest.mark.parametrize("page", sorted((ROOT / "book").glob("*.md")), ids=lambda path: path.stem)
def test_code_on_a_page_in_words_fits_on_it(page):
    blocks = re.findall(r"^```(?:\{code-block\} )?\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 76]


@pytest.mark.book
@names
def test_the_copy_in_the_book_is_its_source_run_from_top_to_bottom(source):
    copy = ROOT / "book" / source.name
    assert copy.is_file(), "run `make book`"
    executed = [cell for cell in cells(copy) if "injected-parameters" not in cell.metadata.get("tags", [])]
    same = [(cell.id, cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in executed]
    assert same == [(cell.id, cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells(source)], (
        f"{source.name} has changed since its copy was made: run `make book`"
    )
    assert [cell.execution_count for cell in code(copy)] == list(range(1, len(code(copy)) + 1))
    assert not [output for cell in code(copy) for output in cell.outputs if output.output_type == "error"]


# ---------------------------------------------------------------- book


def toc():
    """Page -> its title in the sidebar, None where the page's heading is used."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    return {contents["root"]: None} | {chapter["file"]: chapter.get("title") for chapter in chapters}


def test_the_book_holds_every_notebook_and_uses_the_configuration_of_the_repository():
    pages, notebooks = [*toc()], [path.stem for path in SOURCES]
    assert pages[0] == "intro" and set(notebooks) <= set(pages)
    for page in set(pages) - set(notebooks):
        assert (ROOT / "book" / f"{page}.md").is_file(), page
    for name in ("_toc.yml", "_config.yml"):
        link = ROOT / "book" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_the_sidebar_numbers_the_chapters_and_repeats_their_headings():
    """In the order of their files; other pages have no number, and their heading is their title."""
    headings = {path.stem: nbformat.read(path, 4).cells[0].source.splitlines()[0] for path in SOURCES}
    titles = {page: title for page, title in toc().items() if title}
    assert list(titles) == [path.stem for path in SOURCES[:8]]
    for page, title in titles.items():
        assert title == f"{int(page[:2])}. {headings[page].removeprefix('# ')}"


def test_the_results_that_pages_show_are_whole():
    """Each was written by a run from a committed tree: those of chapters and the measurements that they read."""
    paths = [path for path in RESULTS.rglob("*.json") if "failed" not in path.name]
    assert len(paths) > 150
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        keys = {"name", "parameters", "metrics", "seconds", "device", "versions", "commit", "date"}
        assert result.keys() >= keys, path.name
        known = re.fullmatch("[0-9a-f]{40}", result["commit"])
        assert known or path.parent.name == "searches", path.name  # those ran outside a checkout


def test_chapter_10_shows_the_runs_that_made_the_other_pages():
    """It reads their results after they are in place, so commits and times are those of the same `make book`."""
    outputs = [output for cell in code(ROOT / "book" / "10_expected.ipynb") for output in cell.outputs]
    (table,) = [output.data["text/html"] for output in outputs if "<th>MiB</th>" in str(output.get("data"))]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]
    rows = {row[0]: set(row[1:]) for row in rows if row}
    for path in sorted(RESULTS.glob("[0-9]*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.stem != "10_expected":
            assert {result["commit"][:7], str(result["seconds"]), result["date"][:10]} <= rows[path.stem]


def test_the_committed_times_are_of_runs_that_trained():
    """Chapter 10 shows them; where models are kept, a chapter takes seconds."""
    tracked()  # or skip
    for name in ("03_lora", "04_ilora"):
        file = f"HEAD:book/results/{name}.json"
        result = json.loads(subprocess.check_output(["git", "-C", ROOT, "show", file], text=True))
        took, trained = result["seconds"], result["metrics"]["training"]["seconds"]
        assert took > trained, f"{name} found its models kept: remove artifacts/, run `make book` and commit its copies"


def test_the_page_of_ratios_shows_the_committed_benchmarks():
    shown = json.loads((RESULTS / "09_speed.json").read_text(encoding="utf-8"))["metrics"]
    table = benchmark_results.ratios(benchmark_results.load_benchmarks(RESULTS / "benchmarks"))
    ratios = table.loc[table["to"] != table.index.get_level_values("way"), "value"]
    assert set(shown) == set(ratios.index.get_level_values("benchmark"))
    for (benchmark, part, way), value in ratios.items():
        (row,) = [row for row in shown[benchmark] if (row["part"], row["way"]) == (part, way)]
        assert row["value"] == pytest.approx(value)


def test_the_recipes_in_the_log_are_those_of_the_search():
    """Each row of its table: the best of 20 epochs at three dropout rates, as the mean of two seeds."""
    jobs = json.loads((RESULTS / "searches" / "sasrec_recipes_lastfm.json").read_text(encoding="utf-8"))["metrics"]
    jobs = {job["name"]: job for job in jobs["jobs"] if job["kind"] == "sasrec"}
    recipes = {  # row of the table -> name of the job and whether its learning rate falls
        "pieces, cosine schedule": ("ours", True),
        "one row per target, cosine schedule": ("ours+windows", True),
        "one row per target, constant learning rate": ("ours+windows", False),
        "the same, normalised after each block": ("ours architecture, post", False),
        "the same, normalised embeddings instead": ("pre ours + embnorm", False),
        "RecBole's": ("recbole", False),
        "RecBole's, but with pieces": ("pieces", False),
    }
    page = (ROOT / "book" / "log.md").read_text(encoding="utf-8")
    for recipe, (name, falls) in recipes.items():
        epochs = np.array([epoch["hit_ratio"] for epoch in jobs[name]["epochs_run"][:20]])  # (epochs, runs)
        runs = pd.DataFrame(jobs[name]["runs"]).assign(best=epochs.max(0))
        means = runs[runs["cosine"] == falls].groupby("dropout")["best"].mean()
        assert f"| {recipe} | {' | '.join(f'{means[dropout]:.3f}' for dropout in (0.2, 0.3, 0.5))} |" in page


# ---------------------------------------------------------------- README


def test_the_readme_names_the_commands_of_users_and_fits_on_two_screens():
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))
    for command in (
        "make book",
        "make test",
        "jupyter-book build book/",
        "papermill notebooks/04_ilora.ipynb out.ipynb",
    ):
        assert command in commands
    assert len(README.splitlines()) <= 100


def test_the_numbers_in_the_readme_are_those_of_the_results():
    """Each row of its two tables, as `value [low, high]`."""
    ablations, table = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["metrics"]
        for name in ("05_ablations", "07_table")
    )
    gains = {(row["base"], row["conflict"]): row for row in ablations["gain"]}
    assert {row["n"] for row in gains.values()} == {3}  # seeds
    bases = ("Small base", "Small base, trained longer", "SmolLM2-135M")
    rows = [(base.replace("Sma", "sma"), [gains.get((base, conflict)) for conflict in (0, 0.5, 1)]) for base in bases]
    datasets = [table["all"][dataset] for dataset in ("LastFM", "MovieLens", "Steam")]
    rows += [(system, [systems[system] for systems in datasets]) for system in ("SASRec", "TALLRec", "LLaRA", "iLoRA")]
    for name, values in rows:
        cells = [f"{of['value']:.3f} [{of['low']:.3f}, {of['high']:.3f}]" if of else "-" for of in values]
        assert f"| {' | '.join([name, *cells])} |" in README
    for dataset, differences in table["iLoRA - other, all"].items():
        row = differences["LLaRA"]
        assert row["low"] < 0
        assert (row["high"] < 0 and row["p_holm"] < 0.05) == (dataset == "MovieLens")
        assert differences["SASRec"]["value"] < 0
    for comparisons in (table["iLoRA - other, all"], table["LLaRA - other, all"]):
        for dataset, differences in comparisons.items():
            row = differences["TALLRec"]
            assert (row["low"] > 0 and row["p_holm"] < 0.05) == (dataset != "Steam")
    claims = {row["claim"]: row for row in ablations["claims"]}
    instead, unaware = "history instead of noise at conflict 1", "minus best that treats all alike at conflict 1"
    grows = [f"gain over conflict, {row}" for row in ("5,000 sequences", "20,000 sequences, rank 16")]
    longer = "108,800 sequences"
    flat = [f"gain over conflict, {row}" for row in ("20,000 sequences", longer, f"{longer}, SmolLM2")]
    for claim in (*grows, f"{instead}, Small base", "gain at conflict 1 after fewer sequences minus after more"):
        assert claims[claim]["n"] == 3 and claims[claim]["low"] > 0
    for claim in (*flat, f"{instead}, SmolLM2-135M"):
        assert claims[claim]["n"] == 3 and claims[claim]["low"] < 0 < claims[claim]["high"]
    assert all(claims[f"{name} {unaware}, Small base"]["high"] < 0 for name in ("LoRA", "iLoRA"))
    assert [gains[base, 1]["low"] > 0 for base in bases] == [True, False, False]
    assert all(gains[base, 1]["high"] > 0 for base in bases)
    table = sweep_results.differences_from_ilora(table_results.load_table(RESULTS / "table"), "random guidance")
    noise = {row["setting"]: row for row in table[table["variant"] == "random guidance"].to_dict("records")}
    assert noise.keys() == {"LastFM", "MovieLens"}
    assert all(row["n"] == 3 and row["low"] < 0 < row["high"] for row in noise.values())
    gates = {row["setting"]: row for row in ablations["differences"] if row["variant"] == "gate per layer"}
    assert gates["LastFM"]["n"] == 3 and gates["LastFM"]["high"] < 0 and gates["LastFM"]["adjusted p"] < 0.05


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "\nmake test\n" in script.read_text(encoding="utf-8")
