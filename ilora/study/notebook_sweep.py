"""One notebook over a grid of parameters: existing results are kept, failures are reported, and the rest goes on.

    python -m ilora sweep 04 --over conflict 0 0.5 1 --over seed 0 1 2 --jobs 2 --to book/results/conflict

Each point of the grid is a run with a result of its own, so an interrupted sweep resumes where it stopped.
`sweep_results.load_runs` gives the results of a folder as one table.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from ilora.errors import UserError
from ilora.study import parameters, runner
from ilora.study.book import portable
from ilora.study.notebooks import Job, local_paths, plan


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; return the exit code: 1 if a point has no result."""
    parser = argparse.ArgumentParser("python -m ilora sweep", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", metavar="NN", help="notebook to run, such as 04")
    parser.add_argument("--over", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
                        help="a parameter and its values; several make a grid")  # fmt: skip
    runner.add_options(parser, "a parameter of all points")
    options = parser.parse_args(arguments)
    runner.check_options(options)
    jobs = points(options.notebook, local_paths(parameters.parse_parameters(options.parameters)), options.over)
    list(runner.run_cells(jobs, options.jobs, options.minutes))
    if options.to:
        publish(jobs, options.to)
    return 0 if all(job.result.is_file() for job in jobs) else 1


def points(notebook: str, given: dict, over: Sequence[Sequence[str]]) -> list[Job]:
    """One checked job for each point of the grid; the last parameter changes fastest. Raises UserError."""
    names = [name for name, *_ in over]
    for name, *values in over:
        if not values:
            raise UserError(f"--over {name} names no values: give at least one")
        if names.count(name) > 1 or name in given:
            raise UserError(f"parameter {name!r} is given twice: name it once, in --over or in -p")
    grid = itertools.product(*(values for _, *values in over))
    points = (parameters.parse_parameters(list(zip(names, values, strict=True))) for values in grid)
    return [job for point in points for job in plan(given | point, [notebook])]


def publish(jobs: Sequence[Job], folder: Path) -> None:
    """Copy the existing results to `folder`, without names of this machine's folders.

    Outcomes of single users are published only for the world: other data may not be redistributed.
    """
    results = {}
    for path in (job.result for job in jobs if job.result.is_file()):
        results[path.name] = result = portable(json.loads(path.read_text(encoding="utf-8")))
        if result["parameters"].get("dataset", "world") != "world":
            result["outcomes"] = {}
    runner.publish(results, folder)
