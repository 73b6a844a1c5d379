"""What holds the project together: pins, import order, notebooks and their copies, the book, the README."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ilora.study import benchmark_results, parameters

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "book" / "results"
RATES = RESULTS / "table" / "large" / "learning_rate.json"  # histories of six runs, put together as page 7 says
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"^```\n(ilora/\n.*?)^```", README, re.M | re.S)[1]
ROOMS = [  # folders and files, each of which may import those of earlier lines and itself
    {"errors"}, {"devices"}, {"artifacts"}, {"adapter", "data"}, {"training", "evaluation"}, {"recommenders"},
    {"language"}, {"study"},
]  # fmt: skip


def modules():
    """The package's files in the README's tree, in the order that imports follow: `errors`, `data.tables`, ..."""
    room = ""
    for indent, name, kind in re.findall(r"^(  (?:  )?)(\w+)(\.py|/) ", TREE, re.M):
        room = name + "." if kind == "/" else room if len(indent) == 4 else ""
        if kind == ".py":
            yield room + name


MODULES = list(modules())
EXCEPTION = {
    ("study.running", "study.table_runner"),
    ("study.running", "study.notebook_sweep"),
}  # commands that it starts

names = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])


def tracked():
    """The files that git tracks; a source archive has none to ask about."""
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


def test_the_lock_pins_all_that_pyproject_asks_for_within_its_ranges():
    for requirement in direct_requirements():
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(pin), f"{requirement} against {pin}: run `make lock`"


def test_the_lock_holds_pins_alone():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(lines) == len(pins())
    assert "+" not in pins()["torch"]  # a plain pin, for CPU and CUDA builds


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
    """Dotted names of the modules that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_tree_in_the_readme_is_the_tree():
    files = [path.relative_to(ROOT / "ilora").with_suffix("") for path in (ROOT / "ilora").rglob("*.py")]
    rooms = {module.split(".")[0] for module in MODULES if "." in module}
    assert sorted([*MODULES, *(f"{room}.__init__" for room in rooms)]) == sorted(".".join(file.parts) for file in files)
    assert re.findall(r"^  (\w+)\.ipynb ", TREE, re.M) == [path.stem for path in SOURCES]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_each_file_imports_only_files_above_it(module):
    tree = ast.parse((ROOT / "ilora" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    used = {name.removeprefix("ilora.") for name in imported_names(tree)}
    forbidden = used & set(MODULES[MODULES.index(module) :]) - {
        used for importer, used in EXCEPTION if importer == module
    }
    assert not forbidden, f"{module} imports {forbidden}, listed at or below it in the README's tree"


@pytest.mark.parametrize("path", sorted((ROOT / "ilora").rglob("*.py")), ids=lambda path: path.stem)
def test_each_room_imports_only_rooms_before_it(path):
    room = path.relative_to(ROOT / "ilora").parts[0].removesuffix(".py")
    names = set(imported_names(ast.parse(path.read_text(encoding="utf-8"))))
    used = {name.split(".")[1] for name in names if name.startswith("ilora.")} - {"__version__"}
    if room == "__init__":
        assert used <= {"adapter", "language"}  # the latter when it is asked for
        return
    if room == "__main__":
        assert used == {"study"}
        return
    at = next(at for at, rooms in enumerate(ROOMS) if room in rooms)
    before = {"errors"} if room == "adapter" else set().union(*ROOMS[:at])
    assert used <= before | {room}


# ---------------------------------------------------------------- what is tracked


def test_no_data_that_may_not_be_redistributed_is_tracked():
    forbidden = re.compile(r"(^|/)(u\.(data|item)|.*\.df|id2name\.txt|(user_(tagged)?artists.*|artists)\.dat)$")
    assert not [path for path in tracked() if forbidden.search(path)]
    assert not [path for path in tracked() if path.startswith(("artifacts/", "book/_build/"))]


def test_tracked_text_names_no_machines_folders():
    paths = [ROOT / path for path in tracked() if Path(path).suffix in {".py", ".md", ".ipynb", ".json", ".yml"}]
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work)/\w")
    found = [path.name for path in paths if path.is_file() and machine.search(path.read_text(encoding="utf-8"))]
    assert not found


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
    given = parameters._assigned(first.source)
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
    """Page -> its title in the sidebar, None where that is the page's own heading."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    return {contents["root"]: None} | {chapter["file"]: chapter.get("title") for chapter in chapters}


def test_the_book_holds_every_notebook_and_its_own_configuration():
    pages, notebooks = [*toc()], [path.stem for path in SOURCES]
    assert pages[0] == "intro"
    assert [page for page in pages if page in notebooks] == notebooks
    for page in set(pages) - set(notebooks):
        assert (ROOT / "book" / f"{page}.md").is_file(), page
    for name in ("_toc.yml", "_config.yml"):
        link = ROOT / "book" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)


def test_the_sidebar_numbers_the_chapters_and_repeats_their_headings():
    for path in SOURCES:
        heading = nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")
        assert toc()[path.stem] == f"{int(path.stem[:2])}. {heading}"


def test_the_results_that_pages_show_are_whole():
    """Written by a run from a committed tree, those of pages as well as the measurements behind them."""
    paths = [path for path in RESULTS.rglob("*.json") if "failed" not in path.name and path != RATES]
    assert len(paths) > 200
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        keys = {"name", "parameters", "metrics", "seconds", "device", "versions", "commit", "date"}
        assert result.keys() >= keys, path.name
        assert not result["commit"].endswith("+dirty"), path.name


def test_the_page_of_ratios_is_that_of_the_benchmarks_beside_it():
    shown = json.loads((RESULTS / "09_speed.json").read_text(encoding="utf-8"))["metrics"]
    ratios = benchmark_results.ratios(benchmark_results.load_benchmarks(RESULTS / "benchmarks"))["value"]
    assert set(shown) == set(ratios.index.get_level_values("benchmark"))
    for (benchmark, part, way), value in ratios.items():
        (row,) = [row for row in shown[benchmark] if (row["part"], row["way"]) == (part, way)]
        assert row["value"] == pytest.approx(value)


def test_the_book_builds_without_a_warning_and_asks_the_network_for_nothing(html):
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//|<link[^>]*\shref=["']https?:""")
    for page in toc():
        text = (html / f"{page}.html").read_text(encoding="utf-8")
        assert not loads.findall(text), page
    assert "_static/mathjax/tex-mml-chtml.js" in (html / "intro.html").read_text(encoding="utf-8")
    assert (html / "_static/mathjax/tex-mml-chtml.js").is_file()


# ---------------------------------------------------------------- README


def test_the_commands_in_the_readme_exist():
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))
    targets = re.findall(r"^make (\w+)", commands, re.M)
    assert {"book", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert all((ROOT / path).is_file() for path in re.findall(r"notebooks/\w+\.ipynb", commands))
    given = re.findall(r"-p (\w+) (\S+)", commands)
    assert given
    parameters.parse_parameters(given)


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "\nmake test\n" in script.read_text(encoding="utf-8")
