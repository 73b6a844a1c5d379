"""One notebook over a grid of parameters: what is there is skipped, what fails is named, the rest goes on.

    python -m ilora sweep 04 --over conflict 0 0.5 1 --over seed 0 1 2 --jobs 2 --to book/results/conflict

Each point is a run of its own (`python -m ilora --only 04 -p ...`) with a result of its own, so an interrupted sweep
starts again where it stopped. `sweep_results.load_runs` gives the results of a folder as one table.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from ilora.errors import UserError
from ilora.study import parameters, running
from ilora.study.running import ROOT, Job, local_paths, plan, portable


@running.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`; return the exit code: 1 if a point failed."""
    options = parse(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    given = local_paths(parameters.parse_parameters(options.parameters))
    jobs = points(options.notebook, given, options.over)
    failed = run(jobs, options.jobs)
    if options.to:
        publish(jobs, options.to)
    for job, reason in failed:
        print(f"ilora: {describe(job)} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; usage errors exit with code 2."""
    parser = argparse.ArgumentParser("python -m ilora sweep", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("notebook", metavar="NN", help="notebook to run, such as 04")
    add("--over", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
        help="a parameter and its values; several make a grid")  # fmt: skip
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="a parameter of all points")  # fmt: skip
    add("--jobs", type=int, default=1, help="points at once (default 1); set OMP_NUM_THREADS to share the cores")
    add("--to", type=Path, metavar="DIR", help="copy the results there, as the book's pages read them")
    return parser.parse_args(arguments)


def points(notebook: str, given: dict, over: Sequence[Sequence[str]]) -> list[Job]:
    """One checked job for each point of the grid, the last parameter changing fastest.  Raises UserError."""
    names = [name for name, *_ in over]
    for name, *values in over:
        if not values:
            raise UserError(f"--over {name} names no values: give at least one")
        if names.count(name) > 1 or name in given:
            raise UserError(f"parameter {name!r} is given twice: name it once, in --over or in -p")
    grid = itertools.product(*(values for _, *values in over))
    chosen = (parameters.parse_parameters(list(zip(names, point, strict=True))) for point in grid)
    return [job for point in chosen for job in plan(given | point, [notebook])]


def run(jobs: Sequence[Job], at_once: int = 1) -> list[tuple[Job, str]]:
    """Run the jobs that have no result yet; return those that failed, each with the last line it wrote."""
    waiting = [job for job in jobs if not job.result.is_file()]
    done, failed = len(jobs) - len(waiting), []
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), initial=done, unit="run") as bar:
        running = {pool.submit(execute, job): job for job in waiting}
        try:
            for future in as_completed(running):
                if future.result():
                    failed.append((running[future], future.result()))
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def execute(job: Job) -> str:
    """Run one job in a process of its own; the last line it wrote if it failed, else nothing."""
    chosen = itertools.chain.from_iterable(("-p", name, str(value)) for name, value in job.given.items())
    command = [sys.executable, "-m", "ilora", "--only", job.source.stem, "--no-book", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def publish(jobs: Sequence[Job], folder: Path) -> None:
    """Copy the results there are to `folder`, without names of this machine's folders.

    What single users of other data than the world were asked and answered stays here: it may not be redistributed.
    """
    results = {}
    for path in (job.result for job in jobs if job.result.is_file()):
        results[path.name] = result = portable(json.loads(path.read_text(encoding="utf-8")))
        if result["parameters"].get("dataset", "world") != "world":
            result["outcomes"] = {}
    running.publish(results, folder)


def describe(job: Job) -> str:
    """The notebook and what was given to it, as one would type it."""
    chosen = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in job.given.items())
    return f"{job.source.stem} {chosen}"


if __name__ == "__main__":
    sys.exit(main())
