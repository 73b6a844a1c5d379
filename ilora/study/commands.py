"""The command lines of `python -m ilora`: the notebooks and the book, `table`, and `sweep`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ilora.errors import UserError
from ilora.study import book, notebooks
from ilora.study.parameters import PARAMETERS, parse_parameters

HELP = """\
Runs notebooks/*.ipynb in order, each in a new kernel of this Python with the repository as working directory.
The executed notebooks are written to the artifacts folder ($ILORA_HOME, or ./artifacts), as
notebooks/NAME-KEY.ipynb. The KEY is made of package version, parameters, and the content of data and models;
the result has the same one.

With default parameters, and only if every notebook succeeded, the pages of the book are then replaced by the
executed notebooks (book/NAME.ipynb and book/results/NAME.json) and the book is built. A run with -p leaves
book/ unchanged; to read it as a book, name another folder with --book.

More help: `python -m ilora table --help` (the paper's Table 1), `python -m ilora sweep --help` (grids)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 1 for a UserError, which is printed, and 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if [*arguments[:1]] == ["table"]:
            from ilora.study import table_runner  # takes seconds, which `python -m ilora --help` need not

            return table_runner.main(arguments[1:])
        if [*arguments[:1]] == ["sweep"]:
            from ilora.study import notebook_sweep

            return notebook_sweep.main(arguments[1:])
        return _make_book(_parse(arguments))
    except UserError as error:
        print(f"ilora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nilora: interrupted; start again to continue", file=sys.stderr)
        return 130


def _make_book(options: argparse.Namespace) -> int:
    given = notebooks.local_paths(parse_parameters(options.parameters))
    jobs = notebooks.plan(given, options.only)
    if options.no_book or (given and not options.book):
        notebooks.run_all(jobs)
        print("executed notebooks:", *(job.executed for job in jobs), sep="\n  ")
        if given:
            print("book/ keeps its runs with default parameters (--book DIR makes a book of these)")
        return 0
    folder = (options.book or notebooks.ROOT / "book").resolve()
    book.check_folder(folder, given, jobs)
    notebooks.run_all(jobs)
    book.refresh(folder, jobs)
    book.build(folder)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; usage errors exit with code 2."""
    width = max(map(len, PARAMETERS)) + 1
    known = "\n".join(f"  {name:{width}s}{parameter.meaning}" for name, parameter in PARAMETERS.items())
    parser = argparse.ArgumentParser(
        "python -m ilora",
        description=HELP,
        epilog=f"parameters (each notebook gets those it has):\n{known}".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="set a notebook parameter; may be repeated")  # fmt: skip
    add("--only", nargs="+", metavar="NN", help="run only these notebooks, such as 03 04; other pages stay")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--no-book", action="store_true", help="run the notebooks and leave book/ unchanged")
    pages.add_argument("--book", type=Path, metavar="DIR", help="make the book in DIR instead of book/")
    return parser.parse_args(arguments)
