"""The whole story: run the notebooks in order, refresh their copies in the book, build the book."""

import argparse
import ast
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

from ilora import artifacts
from ilora.artifacts import digest, write_json
from ilora.errors import UserError
from ilora.study.parameters import PARAMETERS, check_parameters, inputs, parse_parameters


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """`main`, the function of a command line; a UserError of it ends as its sentence and exit code 1, Ctrl-C as 130."""

    @wraps(main)
    def told(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except UserError as error:
            print(f"ilora: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nilora: interrupted; start again to go on", file=sys.stderr)
            return 130

    return told


def publish(results: Mapping[str, dict[str, Any]], folder: Path, free: Sequence[str] = ()) -> None:
    """Write results (file name -> result) to `folder`, in place of those with the same name and parameters.

    So results of older data, models or versions do not stay next to newer ones. free: parameters that do not count.
    """

    def about(result: Mapping[str, Any]) -> str:
        counted = {name: value for name, value in result.get("parameters", {}).items() if name not in free}
        return digest([result.get("name"), counted])

    new = {about(result) for result in results.values()}
    for path in list(folder.glob("*-*.json")):
        if about(json.loads(path.read_text(encoding="utf-8"))) in new:
            path.unlink()
    for name, result in results.items():
        write_json(folder / name, result)


ROOT = Path(__file__).resolve().parents[2]


JUPYTER_BOOK = Path(sys.executable).with_name("jupyter-book")
WIDGET = "application/vnd.jupyter.widget-view+json"

HELP = """\
Runs notebooks/*.ipynb in order, each in a fresh kernel of this Python with the repository as working
directory, and leaves what ran in the artifacts folder ($ILORA_HOME, or ./artifacts), as
notebooks/NAME-KEY.ipynb, with the KEY of package version, data and models by content,
and parameters that its result has too.

With default parameters, and only if every notebook succeeded, the pages of the book are then replaced by
what ran (book/NAME.ipynb and book/results/NAME.json) and the book is built.  A run with -p leaves book/ as
it is; to read it as a book, name another folder with --book.

`python -m ilora table --help` says how the systems of the paper's Table 1 are run and compared,
`python -m ilora sweep --help` how one notebook is run over a grid of parameters."""


class Failure(Exception):
    """A notebook or the book failed; the message ends in the line that says why."""


@dataclass(frozen=True)
class Job:
    """One notebook to run: its source, the parameters given to it, and all it will run with."""

    source: Path
    given: dict[str, Any]
    parameters: dict[str, Any]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The content of what the parameters name, when it is first needed.  Raises UserError."""
        return inputs(self.parameters, ROOT)

    @property
    def result(self) -> Path:
        """Where `Run.save` puts the notebook's result, if it has one."""
        return artifacts.result_path(self.source.stem, self.parameters, self.inputs)

    @property
    def executed(self) -> Path:
        """Where the executed notebook goes."""
        return artifacts.home() / "notebooks" / f"{self.result.stem}.ipynb"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if [*arguments[:1]] == ["table"]:
        from ilora.study import table_runner  # takes seconds, which `python -m ilora --help` need not

        return table_runner.main(arguments[1:])
    if [*arguments[:1]] == ["sweep"]:
        from ilora.study import notebook_sweep

        return notebook_sweep.main(arguments[1:])
    options = parse(arguments)
    try:
        given = local_paths(parse_parameters(options.parameters))
        jobs = plan(given, options.only)
        book = book_folder(options, given, jobs)
        fresh = run_all(jobs)
        if book:
            refresh(book, jobs, fresh)
            build(book)
        else:
            print("executed notebooks:", *(job.executed for job in jobs), sep="\n  ")
            if given:
                print("book/ keeps its runs with default parameters (--book DIR makes a book of these)")
    except Failure as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; usage errors exit with code 2."""
    width = max(map(len, PARAMETERS)) + 1
    known = "\n".join(f"  {name:{width}s}{parameter.meaning}" for name, parameter in PARAMETERS.items())
    parser = argparse.ArgumentParser(
        "python -m ilora",
        description=HELP,
        epilog=f"parameters (a notebook is given those it has):\n{known}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="set a notebook parameter; may be repeated")  # fmt: skip
    add("--only", nargs="+", metavar="NN", help="run these notebooks alone, such as 03 04; other pages stay")
    book = parser.add_mutually_exclusive_group()
    book.add_argument("--no-book", action="store_true", help="run the notebooks and leave book/ as it is")
    book.add_argument("--book", type=Path, metavar="DIR", help="make the book in DIR instead of book/")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- before any work
def local_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Folders named relative to the shell's working directory, as the notebooks must name them."""
    folders = {
        name: os.path.relpath(value, ROOT)
        for name, value in given.items()
        if name in ("data_dir", "base_model") and value and not Path(value).is_absolute() and Path(value).is_dir()
    }
    return given | folders


def sources() -> list[Path]:
    """The notebooks in their order.  Raises UserError if there are none, as in an installed package."""
    found = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if not found:
        raise UserError(f"there are no notebooks in {ROOT}: run python -m ilora in a clone of the repository")
    if not importlib.util.find_spec("papermill"):
        raise UserError("there is no papermill: pip install -e '.[notebooks,book]' in the repository")
    return found


def plan(given: dict[str, Any], only: Sequence[str] | None) -> list[Job]:
    """The jobs, each with its checked parameters.  Raises UserError."""
    chosen = sources()
    for name in only or ():
        if not any(name in (path.stem, path.stem.split("_")[0]) for path in chosen):
            names = ", ".join(path.stem for path in chosen)
            raise UserError(f"there is no notebook {name!r}: choose among {names}")
    if only:
        chosen = [path for path in chosen if {path.stem, path.stem.split("_")[0]} & set(only)]
    jobs = []
    for source in chosen:
        defaults = parameters_of(source)
        own = {name: value for name, value in given.items() if name in defaults}
        with contextlib.chdir(ROOT):  # where the notebooks find the folders that are named
            jobs.append(Job(source, own, check_parameters(defaults | own)))
    for name in given:
        if not any(name in job.given for job in jobs):
            names = ", ".join(job.source.stem for job in jobs)
            raise UserError(f"none of the notebooks to run ({names}) has a parameter {name!r}: leave it out")
    return jobs


def read(path: Path) -> Any:
    """The notebook as nbformat's NotebookNode."""
    import nbformat

    return nbformat.read(path, as_version=4)


def parameters_of(source: Path) -> dict[str, Any]:
    """Names and defaults in the cell tagged `parameters`, which holds `name = value` lines alone."""
    tagged = [cell for cell in read(source).cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [line for cell in tagged for line in ast.parse(cell.source).body]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def book_folder(options: argparse.Namespace, given: dict[str, Any], jobs: list[Job]) -> Path | None:
    """The folder whose pages will be replaced, or None.  Raises UserError if that cannot end well."""
    if options.no_book or (given and not options.book):
        return None
    book = (options.book or ROOT / "book").resolve()
    if not JUPYTER_BOOK.is_file():
        raise UserError("there is no jupyter-book: pip install -e '.[notebooks,book]', or add --no-book")
    if given and book == ROOT / "book":
        raise UserError("book/ is for runs with default parameters: name another folder with --book")
    if book.exists() and not (book / "intro.md").is_file() and any(book.iterdir()):
        raise UserError(f"{book} holds other files than a book: name a new or empty folder with --book")
    running = {job.source.name for job in jobs}
    missing = [path.name for path in sources() if path.name not in running and not (book / path.name).is_file()]
    if missing:
        raise UserError(f"the book would lack {', '.join(missing)}: leave out --only, or add --no-book")
    return book


# ---------------------------------------------------------------- running
def run_all(jobs: list[Job]) -> set[Path]:
    """Run the jobs in order; return the results that they wrote.  Raises Failure at the first that fails."""
    os.environ["ILORA_HOME"] = str(artifacts.home())
    kernels = str(Path(sys.prefix, "share", "jupyter"))  # where the kernel python3 is this environment's
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [kernels, os.environ.get("JUPYTER_PATH")]))
    os.environ.setdefault("PYTHONHASHSEED", "0")  # sets print in one order
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning at kernel start
    before = {job.result: modified(job.result) for job in jobs}  # reads the inputs before any work
    for number, job in enumerate(jobs, 1):
        execute(job, f"{job.source.stem} ({number} of {len(jobs)})")
    return {path for path, time in before.items() if modified(path) != time}


def modified(path: Path) -> int:
    """Time of the last change, ns; 0 if there is no such file."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def execute(job: Job, title: str) -> None:
    """Run one notebook with a progress bar over its cells on stderr.  Raises Failure."""
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook
    from traitlets.config import Config

    job.executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        execute_notebook(
            job.source,
            job.executed,
            job.given,
            kernel_name="python3",
            cwd=ROOT,
            progress_bar={"desc": title, "file": sys.stderr, "dynamic_ncols": True},
            config=Config(KernelManager={"transport_encryption": "auto"}),  # else each kernel warns
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip()
        raise Failure(describe(job, error.exec_count, error.source, reason)) from error
    except DeadKernelError as error:
        reason = "the kernel died, as it does when memory runs out"
        cells = [cell for cell in read(job.executed).cells if cell.cell_type == "code"]
        number = sum(cell.metadata.papermill.start_time is not None for cell in cells)
        raise Failure(describe(job, number, cells[number - 1].source, reason)) from error


def describe(job: Job, number: int | None, source: str, reason: str) -> str:
    """Which notebook and cell failed, where to look, and why."""
    first = source.strip().splitlines()[0]
    return (
        f"ilora: {job.source.name} failed in cell [{number}], which begins: {first}\n"
        f"what ran is in {job.executed}; the book is as it was\n{reason}"
    )


# ---------------------------------------------------------------- the book
def refresh(book: Path, jobs: list[Job], fresh: set[Path]) -> None:
    """Put the executed notebooks and their fresh results in the book; remove what has no source any more."""
    if book != ROOT / "book":
        leave = shutil.ignore_patterns("_build", "results", "*.ipynb")
        shutil.copytree(ROOT / "book", book, ignore=leave, dirs_exist_ok=True)
    pages = [normalised(read(job.executed), read(job.source)) for job in jobs]
    for job, page in zip(jobs, pages, strict=True):
        artifacts.write_atomic(book / job.source.name, page)
        result = book / "results" / f"{job.source.stem}.json"
        result.unlink(missing_ok=True)
        if job.result in fresh:
            artifacts.write_json(result, portable(json.loads(job.result.read_text(encoding="utf-8"))))
    stems = {path.stem for path in sources()}
    for path in [*book.glob("[0-9][0-9]_*.ipynb"), *book.glob("results/[0-9][0-9]_*.json")]:
        if path.stem not in stems:
            path.unlink()


def normalised(executed: Any, source: Any) -> str:
    """The executed notebook as text that two equal runs share: no timings, random ids or machine's folders.

    Progress bars go: what was written to stderr, and widgets, which a page without a kernel cannot show.
    """
    import nbformat

    own = {cell.id: cell.metadata for cell in source.cells}
    numbers = itertools.count(1)
    for cell in executed.cells:
        if cell.id not in own:  # the parameters that papermill injected
            cell.id = "injected-parameters"
        cell.metadata = own.get(cell.id, {"tags": ["injected-parameters"]})
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(portable(output)) for output in shown(cell.outputs)]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = numbered(output.data["text/html"], numbers)
    language = {name: value for name, value in executed.metadata.language_info.items() if name != "version"}
    executed.metadata = source.metadata | {"language_info": language}
    return nbformat.writes(executed).rstrip("\n") + "\n"


def shown(outputs: list[Any]) -> Iterator[Any]:
    """Outputs without stderr and widgets; text printed in several pieces is one."""
    outputs = [o for o in outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
    for kind, group in itertools.groupby(outputs, lambda output: output.output_type):
        if kind == "stream":
            first, *more = group
            yield first | {"text": first.text + "".join(output.text for output in more)}
        else:
            yield from group


def numbered(html: str, numbers: Iterator[int]) -> str:
    """HTML whose random ids (styled pandas tables, matplotlib's animations) are the next of `numbers`."""
    for table, animation in re.findall(r'id="(?:(T_[0-9a-f]{5})|_anim_img([0-9a-f]{32}))"', html):
        html = html.replace(table or animation, f"{'T_' if table else ''}{next(numbers)}")
    return html


def portable(value: Any) -> Any:
    """JSON whose strings name no folder of this machine, but `artifacts`, `.` and `~`, and no address in memory.

    Of a data_dir elsewhere the name is left.
    """
    if isinstance(value, dict):
        elsewhere = {"data_dir"} if os.path.isabs(str(value.get("data_dir"))) else set()
        return {name: Path(item).name if name in elsewhere else portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        for folder, name in ((artifacts.home(), "artifacts"), (ROOT, "."), (Path.home(), "~")):
            if len(folder.parts) > 1:  # a home of `/` is in every path
                value = re.sub(rf"(?<![\w.]){re.escape(str(folder))}(?![\w.-])", name, value)
        value = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x0", value)
    return value


def build(book: Path) -> None:
    """Build the HTML anew (pages kept from an earlier build would hide their warnings).  Raises Failure."""
    print("building the book", file=sys.stderr)
    command = [JUPYTER_BOOK, "build", book, "--all", "-W", "-n", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failure(f"{done.stdout}\nilora: the book did not build; its warnings are above")
    print("the book:", book / "_build" / "html" / "index.html")


if __name__ == "__main__":
    sys.exit(main())
