"""The runner, on throwaway notebooks in a throwaway repository."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import tqdm

from ilora import artifacts
from ilora.errors import UserError
from ilora.study import book, commands, notebooks
from ilora.study.parameters import PARAMETERS

pytestmark = pytest.mark.book

DEFAULTS = {"seed": 0, "rank": 8, "experts": 4}
PARAMETERS_CELL = "seed = 0  # a seed\nrank = 8  # r\nexperts = 4  # K"
OUTPUTS_CELL = """\
import os, sys
print(os.getcwd(), os.environ["ILORA_HOME"] + "/data", object())
print("50% done", file=sys.stderr)
print("cells", experts)"""
RESULT_CELL = """\
from pathlib import Path
result = Path(os.environ["ILORA_HOME"], "results", os.environ["RESULT"])
result.parent.mkdir(exist_ok=True)
result.write_text('{"metrics": {"experts": %d}, "folder": "%s"}' % (experts, os.getcwd()))
sys.prefix == os.environ["PREFIX"]"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two notebooks; jupyter-book is not run: its calls are listed, and all but the first fail."""
    root = tmp_path / "repo"
    write(root / "notebooks" / "01_one.ipynb", PARAMETERS_CELL, OUTPUTS_CELL, RESULT_CELL)
    write(root / "notebooks" / "02_two.ipynb", "seed = 0  # a seed", "seed + 1")
    (root / "book").mkdir()
    (root / "book" / "intro.md").write_text("# Intro\n")
    builds = []

    def build(command, **_):
        builds.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, len(builds) > 1, "WARNING: no such page")

    monkeypatch.setattr(notebooks, "ROOT", root)
    monkeypatch.setattr(subprocess, "run", build)
    monkeypatch.chdir(tmp_path)
    environment = {
        "ILORA_HOME": str(tmp_path / "home"),
        "JUPYTER_PATH": "",
        "OMP_NUM_THREADS": "1",
        "PREFIX": sys.prefix,
        "RESULT": f"01_one-{artifacts.key(DEFAULTS, {})}.json",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return root, builds


def write(path, *sources):
    """A notebook whose first cell holds the parameters."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(source, id=f"cell{number}") for number, source in enumerate(sources)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p expert 4", "there is no parameter 'expert': did you mean 'experts'?"),
        ("-p experts 4.0", "parameter 'experts' must be a whole number, not 4.0 (float)"),
        ("-p experts 3", "experts = 3 does not divide rank = 8: choose experts among 1, 2, 4, 8"),
        ("-p window 5", "no notebook of this run has a parameter 'window': leave it out"),
        ("--only 02 -p experts 2", "no notebook of this run has a parameter 'experts'"),
        ("--only 7", "there is no notebook '7': choose among 01, 01_one, 02, 02_two"),
        ("--only 01", "the book would lack 02_two.ipynb: leave out --only, or add --no-book"),
        ("-p seed 1 --book repo/book", "book/ is for runs with default parameters: name another folder"),
        ("--book repo/notebooks", "holds other files than a book"),
    ],
)
def test_what_cannot_end_well_is_refused_in_one_line_before_any_work(repository, capfd, arguments, message):
    before = files(repository[0])
    assert commands.main(arguments.split()) == 1
    printed = capfd.readouterr()
    assert message in printed.err
    assert printed.err.startswith("ilora: ")
    assert printed.err.count("\n") == 1
    assert files(repository[0]) == before
    assert not (repository[0].parent / "home" / "notebooks").exists()


def test_an_installed_package_without_notebooks_says_so(repository, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path / "site-packages")
    assert commands.main([]) == 1
    assert "run python -m ilora in a clone of the repository" in capsys.readouterr().err


def test_help_names_every_parameter(capsys):
    with pytest.raises(SystemExit) as exit_:
        commands.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert {*PARAMETERS} <= {*re.findall(r"\w+", printed)}


def test_folders_are_named_from_where_the_notebooks_run(repository, tmp_path):
    (tmp_path / "data").mkdir()
    given = {"data_dir": "data", "base_model": "data", "seed": 1}
    assert notebooks.local_paths(given) == {"data_dir": "../data", "base_model": "../data", "seed": 1}
    for same in ({"data_dir": ""}, {"data_dir": str(tmp_path)}, {"base_model": "maker/model"}):
        assert notebooks.local_paths(same) == same


def test_a_sweep_takes_its_folders_from_the_shell(repository, tmp_path, monkeypatch):
    for folder in (tmp_path / "shell" / "data", repository[0] / "data"):  # the same name in both places
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shell")
    write(repository[0] / "notebooks" / "03_three.ipynb", "data_dir = ''  # a folder", "data_dir")
    (job,) = notebooks.points("03", {}, [["data_dir", "data"]])
    assert (repository[0] / job.parameters["data_dir"]).samefile(tmp_path / "shell" / "data")


def test_an_interrupt_ends_in_one_sentence(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_make_book", interrupted)
    assert commands.main([]) == 130
    assert "ilora: interrupted; start again to continue" in capsys.readouterr().err


# ---------------------------------------------------------------- running


def test_a_run_refreshes_the_book_and_builds_it(repository, capfd):
    root, builds = repository
    pages = root / "book"
    (pages / "results").mkdir()
    (pages / "results" / "02_two.json").write_text("{}")  # which the notebook writes no more

    assert commands.main([]) == 0
    printed = capfd.readouterr()
    assert "2/2" in printed.err
    assert printed.out.splitlines()[-1] == f"the book: {pages / '_build' / 'html' / 'index.html'}"
    assert builds == [[str(book.JUPYTER_BOOK), "build", str(pages), "--all", "-W", "-n", "--keep-going"]]
    assert sorted(files(pages)) == ["01_one.ipynb", "02_two.ipynb", "intro.md", "results/01_one.json"]
    assert json.loads((pages / "results" / "01_one.json").read_text()) == {
        "metrics": {"experts": 4}, "folder": "."
    }  # fmt: skip
    first, outputs, result = nbformat.read(pages / "01_one.ipynb", as_version=4).cells
    source = nbformat.read(root / "notebooks" / "01_one.ipynb", as_version=4).cells
    assert [(cell.id, cell.metadata) for cell in (first, outputs, result)] == [
        (cell.id, cell.metadata) for cell in source
    ]
    assert [cell.execution_count for cell in (first, outputs, result)] == [1, 2, 3]
    assert [output.text for output in outputs.outputs] == [". artifacts/data <object object at 0x0>\ncells 4\n"]
    assert result.outputs[0].data["text/plain"] == "True"  # the kernel is this environment's

    copies = files(pages)
    assert commands.main(["--only", "01"]) == 1  # the second build fails
    assert files(pages) == copies
    assert capfd.readouterr().err.endswith(
        "WARNING: no such page\nilora: the book did not build; its warnings are above\n"
    )


def test_a_run_with_parameters_leaves_the_book_alone_unless_a_folder_is_named(repository, capfd):
    root, builds = repository
    before = files(root / "book")
    home = root.parent / "home" / "notebooks"
    one = home / f"01_one-{artifacts.key(DEFAULTS | {'experts': 2}, {})}.ipynb"
    two = home / f"02_two-{artifacts.key({'seed': 0}, {})}.ipynb"

    assert commands.main(["-p", "experts", "2", "--only", "02_two", "01"]) == 0  # 02 is not given experts
    assert files(root / "book") == before
    assert not builds
    assert sorted(home.iterdir()) == [one, two]
    printed = capfd.readouterr().out
    assert str(one) in printed

    (root / "notebooks" / "02_two.ipynb").unlink()
    os.environ["RESULT"] = one.with_suffix(".json").name
    assert commands.main(["-p", "experts", "2", "--book", "mine"]) == 0
    mine = root.parent / "mine"
    assert files(root / "book") == before
    assert sorted(files(mine)) == ["01_one.ipynb", "intro.md", "results/01_one.json"]
    injected = nbformat.read(mine / "01_one.ipynb", as_version=4).cells[1]
    assert injected.source == "# Parameters\nexperts = 2\n"
    assert (injected.id, injected.metadata.tags) == ("injected-parameters", ["injected-parameters"])


READS_RESULTS_CELL = """\
import json
from pathlib import Path
print(json.loads(Path(results, "01_one.json").read_text())["metrics"])"""


@pytest.mark.parametrize("where", ["repo/book", "mine"])
def test_a_notebook_that_reads_the_results_of_the_book_reads_those_of_this_run(repository, where):
    root, _ = repository
    write(root / "notebooks" / "00_all.ipynb", 'results = "book/results"  # a folder', READS_RESULTS_CELL)
    (root / "book" / "results" / "sweeps").mkdir(parents=True)
    (root / "book" / "results" / "01_one.json").write_text('{"metrics": "of the last run"}')
    (root / "book" / "results" / "sweeps" / "01_one-0.json").write_text("{}")
    assert commands.main(["--book", where]) == 0
    book_of_this_run = root.parent / where
    *_, reading = nbformat.read(book_of_this_run / "00_all.ipynb", as_version=4).cells
    assert [output.text for output in reading.outputs] == ["{'experts': 4}\n"]
    assert {"results/01_one.json", "results/sweeps/01_one-0.json"} <= files(book_of_this_run).keys()


def test_links_of_chapters_lead_to_pages_of_their_book(repository):
    root, _ = repository
    source = root / "notebooks" / "01_one.ipynb"
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells.append(nbformat.v4.new_markdown_cell("See [](../book/intro.md).", id="link"))
    nbformat.write(notebook, source)
    job = SimpleNamespace(source=source, executed=source, result=root / "none.json")
    for folder, page in (root / "book", "../book/intro.md"), (root.parent / "my book", "intro.md"):
        book.refresh(folder, [job])
        assert nbformat.read(folder / source.name, as_version=4).cells[-1].source == f"See []({page})."


@pytest.mark.parametrize(
    ("cell", "begins", "reason"),
    [
        ("value = (\n    1 / 0)", "value = (", "ZeroDivisionError: division by zero"),
        (f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})", "", "the kernel died"),
    ],
)
def test_a_failure_names_notebook_cell_and_reason_and_leaves_the_book_alone(repository, capfd, cell, begins, reason):
    root, builds = repository
    write(root / "notebooks" / "01_one.ipynb", "seed = 0", "seed + 1", cell, "seed + 2")
    before = files(root)
    assert commands.main([]) == 1
    *_, where, kept, last = capfd.readouterr().err.splitlines()
    assert where == "ilora: 01_one.ipynb failed" + (f" in cell [3], which begins: {begins}" if begins else "")
    assert str(root.parent / "home" / "notebooks" / "01_one-") in kept
    assert last.startswith(reason)
    assert files(root) == before
    assert not builds


STARTED_CELL = """\
import time
from pathlib import Path
Path("started").touch()
time.sleep(60)"""
WAITING_CELL = """\
import os, signal, time
from pathlib import Path
while not Path("started").exists():
    time.sleep(0.01)"""


@pytest.mark.parametrize(
    ("cell", "code", "message"),
    [("1 / 0", 1, "ilora: 01_one.ipynb failed"), ("os.kill(os.getppid(), signal.SIGINT)", 130, "ilora: interrupted")],
)
def test_nothing_goes_on_after_a_failure_or_an_interrupt(repository, tmp_path, monkeypatch, capfd, cell, code, message):
    """A notebook that ended later would change the process's working directory back once more."""
    root, _ = repository
    write(root / "notebooks" / "01_one.ipynb", "seed = 0", WAITING_CELL, cell + "\ntime.sleep(60)")
    write(root / "notebooks" / "02_two.ipynb", "seed = 0", STARTED_CELL)
    write(root / "notebooks" / "03_three.ipynb", "seed = 0", "seed + 1")
    monkeypatch.setenv("ILORA_HOME", "home")  # from the shell's working directory
    threads, processes = set(threading.enumerate()), set(psutil.Process().children())
    started = time.monotonic()
    assert commands.main(["--no-book"]) == code
    assert message in capfd.readouterr().err
    leftover = [thread for thread in set(threading.enumerate()) - threads if not isinstance(thread, tqdm.TMonitor)]
    for thread in leftover:
        thread.join(20)
    assert (os.getcwd(), leftover) == (str(tmp_path), [])
    assert set(psutil.Process().children()) <= processes
    assert time.monotonic() - started < 30
    assert sorted(path.name[:2] for path in (tmp_path / "home" / "notebooks").iterdir()) == ["01", "02"]


def test_a_kernel_that_starts_after_a_failure_is_killed_too(repository, monkeypatch):
    starting, kernels = threading.Event(), []

    def run(job, progress):
        if job.source.stem == "01_one":
            starting.wait()
            raise UserError("failed")
        starting.set()
        time.sleep(0.5)
        kernels.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]))
        kernels[0].wait()

    monkeypatch.setattr(notebooks.Job, "run", run)
    with pytest.raises(UserError, match="failed"):
        notebooks.run_all(notebooks.plan({}, None))
    assert kernels[0].poll() == -signal.SIGKILL


# ---------------------------------------------------------------- copies


def test_widgets_and_timings_do_not_reach_a_copy(repository):
    copies = []
    for digit in "ab":
        outputs = [nbformat.v4.new_output("display_data", {"text/plain": "0%", book.WIDGET: {"model_id": digit}})]
        cells = [nbformat.v4.new_code_cell("1", id="x", outputs=outputs, metadata={"papermill": {"duration": digit}})]
        executed = nbformat.v4.new_notebook(cells=cells)
        language = {"name": "python", "version": digit}
        executed.metadata = nbformat.from_dict({"widgets": digit, "language_info": language})
        source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", id="x")])
        copies.append(json.dumps(book.normalised(executed, source)))
    assert copies[0] == copies[1]
    assert "widget" not in copies[0]


def test_the_first_word_table_makes_a_table(capsys):
    assert commands.main(["table", "--systems", "nobody"]) == 1
    assert "there is no 'nobody' here: choose among Popularity" in capsys.readouterr().err


def test_a_published_result_names_no_folder_of_this_machine():
    given = {"data_dir": "/somewhere/of/mine/data", "list": [{"data_dir": "data", "dataset": "movielens"}]}
    assert book.portable(given) == {"data_dir": "data", "list": [{"data_dir": "data", "dataset": "movielens"}]}
    assert book.portable(str(notebooks.ROOT / "book")) == "./book"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x is wrong: fix it"), 1, "ilora: x is wrong: fix it\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_command_line_ends_with_one_sentence(error, code, message, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(notebooks, "plan", fail)
    assert commands.main([]) == code and message in capsys.readouterr().err
