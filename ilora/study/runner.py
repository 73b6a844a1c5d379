"""Run cells of a table or a sweep in several processes, each on its GPU, and publish their results.

A cell is one run: `result` is the file that it writes, `run()` writes it, `str(cell)` names it.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ilora.artifacts import digest, write_json
from ilora.errors import UserError


class Cell(Protocol):
    """What `run_cells` runs. It is sent to other processes by pickle."""

    result: Path

    def run(self) -> None:
        """Write `result`, or raise the reason why not; an attribute `reason` of the error is preferred to its text."""


def add_options(parser: ArgumentParser, about_parameters: str) -> None:
    """Add the options that `table` and `sweep` share."""
    add = parser.add_argument
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters", help=about_parameters)
    add("--jobs", type=int, default=1, metavar="N",
        help="cells at a time (1), distributed over the GPUs; set OMP_NUM_THREADS to share the cores")  # fmt: skip
    add("--minutes", type=float, default=0, metavar="N",
        help="stop after N minutes; started again, training resumes from its last checkpoints (no limit)")  # fmt: skip
    add("--to", type=Path, metavar="DIR", help="copy the results to DIR, where the book's pages read them")


def check_options(options: Namespace) -> None:
    """Raise UserError for options that cannot be used."""
    if options.jobs < 1 or not 0 <= options.minutes < math.inf:
        raise UserError(f"--jobs must be at least 1 and --minutes 0 or more: {options.jobs}, {options.minutes}")


def run_cells(cells: Sequence[Cell], jobs: int = 1, minutes: float = 0) -> Iterator[tuple[Cell, str]]:
    """Run the cells that have no result yet, `jobs` at a time; yield each with its reason to fail, "" if it succeeded.

    minutes: when to stop, 0 for never. Cells that are running then are stopped; their training resumes from its last
    checkpoint the next time.
    """
    waiting = [cell for cell in cells if not cell.result.is_file()]
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", smoothing=0) as bar:
        for cell, reason in _attempts(waiting, jobs, minutes):
            bar.set_postfix_str(str(cell), refresh=False)
            bar.update()
            if reason:
                bar.write(f"ilora: {cell} failed: {reason}", file=sys.stderr)
            yield cell, reason


def attempt(cell: Cell) -> str:
    """Run a cell; return "" or, if it failed, the reason in one line."""
    try:
        cell.run()
    except Exception as error:  # the other cells still run
        return getattr(error, "reason", f"{type(error).__name__}: {error}").splitlines()[0]
    return ""


def _attempts(waiting: Sequence[Cell], jobs: int, minutes: float) -> Iterator[tuple[Cell, str]]:
    if jobs == 1 and not minutes:
        yield from ((cell, attempt(cell)) for cell in waiting)
        return
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    left, running = list(reversed(waiting)), {}  # running: connection -> its process and cell
    free = [_start(number) for number in range(min(jobs, len(waiting)))]
    try:
        while left or running:
            while left and free and time.monotonic() < deadline:
                connection, process = free.pop(0)
                running[connection] = process, left.pop()
                connection.send(running[connection][1])
            ready = wait(running, None if math.isinf(deadline) else max(deadline - time.monotonic(), 0))
            if not ready:  # the time is up
                return
            for connection in ready:
                process, cell = running[connection]
                yield cell, connection.recv()
                free.append((connection, running.pop(connection)[0]))
    except EOFError as error:
        raise UserError(
            "a process died, as it does when memory runs out: start again with fewer --jobs; finished cells are kept"
        ) from error
    finally:
        _stop([process for process, _ in running.values()] + [process for _, process in free])


def _start(number: int) -> tuple[Connection, BaseProcess]:
    """A process that attempts the cells sent to it; if there are several GPUs, it sees one of them."""
    ours, theirs = (context := multiprocessing.get_context("spawn")).Pipe()
    process = context.Process(target=_work, args=(theirs,))
    before = dict(os.environ)
    os.environ.update(_environment(number))  # the new process inherits it before it imports torch
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()  # so that the end of the process closes the connection
    return ours, process


def _environment(number: int) -> dict[str, str]:
    """Variables of a process: no progress bars, which would overwrite each other, and one of several GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    return {"TQDM_DISABLE": "1"} | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {})


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly exit, which removes unfinished files
    with suppress(EOFError):  # the parent process has ended
        while True:
            connection.send(attempt(connection.recv()))


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(30)
        process.kill()


def publish(results: Mapping[str, dict[str, Any]], folder: Path, ignored: Sequence[str] = ()) -> None:
    """Write results (file name -> result) to `folder`, replacing those with the same name and parameters.

    Results of older data, models or versions are removed in this way. ignored: parameters that are not compared.
    """

    def identity(result: Mapping[str, Any]) -> str:
        compared = {name: value for name, value in result.get("parameters", {}).items() if name not in ignored}
        return digest([result.get("name"), compared])

    new = {identity(result) for result in results.values()}
    for path in list(folder.glob("*-*.json")):
        if identity(json.loads(path.read_text(encoding="utf-8"))) in new:
            path.unlink()
    for name, result in results.items():
        write_json(folder / name, result)
