"""The command line `python -m ilora`: the notebooks and the book, `table`, and `sweep`."""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ilora import artifacts, data
from ilora.errors import UserError
from ilora.study import book, notebooks, runner, table_runner
from ilora.study.parameters import PARAMETERS, parse_parameters
from ilora.study.systems import SETTINGS, SYSTEMS, TABLE

BOOK = """\
Runs notebooks/*.ipynb in order, without a GPU two at a time, each in a new kernel in the repository's folder, and
writes them to $ILORA_HOME/notebooks (or artifacts/notebooks). For a book, chapter 10 comes last, because it reads the
results of the other chapters there. If every notebook succeeded, they and their results become the pages of book/,
which is built. A run with -p leaves book/ unchanged; --book DIR makes a book of it in another folder.

More help: `python -m ilora table --help` (the paper's Table 1), `python -m ilora sweep --help` (grids)."""
SWEEP = """\
Runs one notebook over a grid of parameters: existing results are kept, failures are reported, and the rest goes on.

    python -m ilora sweep 04 --over conflict 0 0.5 1 --over seed 0 1 2 --jobs 2 --to book/results/conflict"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 1 for a UserError, which is printed, and 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"table": _make_table, "sweep": _make_sweep}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        if arguments and not arguments[0].startswith("-"):
            raise UserError(f"there is no command {arguments[0]!r}: choose table or sweep, or none for the book")
        return _make_book(arguments)
    except UserError as error:
        print(f"ilora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nilora: interrupted; start again to continue", file=sys.stderr)
        return 130


def _make_book(arguments: Sequence[str]) -> int:
    parser = _parser("", BOOK, PARAMETERS)
    parser.add_argument("--only", nargs="+", metavar="NN", help="run only these notebooks, such as 03 04")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--no-book", action="store_true", help="run the notebooks and leave book/ unchanged")
    pages.add_argument("--book", type=Path, metavar="DIR", help="make the book in DIR instead of book/")
    options, given = _parse(parser, arguments)
    jobs = notebooks.plan(notebooks.local_paths(given), options.only)
    if options.no_book or (given and not options.book):
        notebooks.run_all(jobs)
        print("executed notebooks:", *(job.executed for job in jobs), sep="\n  ")
        return 0
    folder = (options.book or notebooks.ROOT / "book").resolve()
    book.check_folder(folder, given, jobs)
    book.make(folder, jobs)
    book.build(folder)
    return 0


def _make_table(arguments: Sequence[str]) -> int:
    parser = _parser("table", table_runner.__doc__, SETTINGS, cells=True)
    add = parser.add_argument
    add("--datasets", nargs="+", default=["world"], metavar="NAME", help=f"{', '.join(data.WORDS)} (world)")
    add("--data-dir", default="", metavar="DIR", help="folder with their files")
    add("--systems", nargs="+", default=TABLE, metavar="NAME", help=f"{'; '.join(SYSTEMS)} (Table 1 but ChatRec)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of training (0 1 2)")
    add("--draws", type=int, default=5, metavar="N", help="of candidates for the last windows (5)")
    options, given = _parse(parser, arguments)
    if unused := sorted(given.keys() - SETTINGS):
        raise UserError(f"a table has no parameter {unused[0]!r}: the ones it has are {', '.join(SETTINGS)}")
    names = ("datasets", "systems", "seeds", "draws", "data_dir")
    cells = table_runner.cells(*(getattr(options, name) for name in names), SETTINGS | given)
    failed = table_runner.run_all(cells, options.jobs, options.minutes)
    finished = [cell for cell in cells if cell.result.is_file()]
    if len(finished) + len(failed) == len(cells):  # else the time is up
        for cell in finished:
            table_runner.search(cell)
    if options.to:
        table_runner.publish(cells, options.to)
    print(f"{len(finished)} of {len(cells)} cells are in {artifacts.home() / 'results'}")
    return 0 if len(finished) == len(cells) else 1


def _make_sweep(arguments: Sequence[str]) -> int:
    parser = _parser("sweep", SWEEP, PARAMETERS, cells=True)
    parser.add_argument("notebook", metavar="NN", help="notebook to run, such as 04")
    over = {"nargs": "+", "action": "append", "required": True, "metavar": ("NAME", "VALUE")}
    parser.add_argument("--over", **over, help="a parameter and its values; several make a grid")
    options, given = _parse(parser, arguments)
    jobs = notebooks.points(options.notebook, notebooks.local_paths(given), options.over)
    list(runner.run_cells(jobs, options.jobs, options.minutes))
    if options.to:
        book.publish(jobs, options.to)
    return 0 if all(job.result.is_file() for job in jobs) else 1


def _parser(command: str, description: str, known: Iterable[str], cells: bool = False) -> argparse.ArgumentParser:
    """The options that commands share: -p and, for those that run cells, --jobs, --minutes and --to."""
    program, style = f"python -m ilora {command}".strip(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=description, formatter_class=style)
    add = parser.add_argument
    about = f"set a parameter, which the notebooks' first cells explain: {', '.join(known)}"
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters", help=about)
    if cells:
        add("--jobs", type=int, default=1, metavar="N", help="cells at a time (1), distributed over the GPUs")
        add("--minutes", type=float, default=0, metavar="N", help="stop after N minutes; the next start resumes")
        add("--to", type=Path, metavar="DIR", help="copy the results to DIR, where the book's pages read them")
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options and the checked parameters. Usage errors exit with code 2; raises UserError."""
    options = parser.parse_args(arguments)
    if "jobs" in options and (options.jobs < 1 or not 0 <= options.minutes < math.inf):
        raise UserError(f"--jobs must be at least 1 and --minutes 0 or more: {options.jobs}, {options.minutes}")
    return options, parse_parameters(options.parameters)
