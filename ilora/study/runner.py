"""Run cells of a table or a sweep in several processes, each on its GPU, and publish their results.

A cell is one run: `run()` writes the file `result` or raises an error, perhaps with a `reason`; `str(cell)` names it.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ilora.artifacts import digest, write_json
from ilora.errors import UserError

Cell = Any  # see above


def run_cells(cells: Sequence[Cell], jobs: int = 1, minutes: float = 0) -> Iterator[tuple[Cell, str]]:
    """Run cells without a result, `jobs` at a time, for `minutes` (0: no limit); yield each and its failure or ""."""
    waiting = [cell for cell in cells if not cell.result.is_file()]
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", smoothing=0) as bar:
        if jobs == 1 and not minutes:
            attempts = ((cell, attempt(cell)) for cell in waiting)
        else:
            attempts = _in_processes(waiting, jobs, minutes)
        for cell, reason in attempts:
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


def _in_processes(waiting: Sequence[Cell], jobs: int, minutes: float) -> Iterator[tuple[Cell, str]]:
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    os.environ["TQDM_DISABLE"] = "1"  # for the new processes, whose progress bars would overwrite each other
    pool = ProcessPoolExecutor(jobs, context, _prepare_process, (numbers,))
    futures = {pool.submit(attempt, cell): cell for cell in waiting}
    try:
        for future in as_completed(futures, 60 * minutes or None):
            yield futures[future], future.result()
    except TimeoutError:
        return
    except BrokenProcessPool as error:
        raise UserError("a process died, as it does when memory runs out: start again with fewer --jobs") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in (processes := set(multiprocessing.active_children()) - others):
            process.terminate()
        for process in processes:
            process.join(30)
            process.kill()


def _prepare_process(numbers: SimpleQueue) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly exit, which removes unfinished files
    os.environ.update(gpu(numbers.get()))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # several processes share a GPU


def gpu(number: int) -> dict[str, str]:
    """The variable that shows one of several GPUs to the process with this number."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {}


def publish(paths: Iterable[Path], folder: Path, ignored: Sequence[str] = (), change: Callable = dict) -> None:
    """Copy the results that exist to `folder`, in place of those with the same parameters (except `ignored` ones)."""

    def identity(result: Mapping[str, Any]) -> str:
        compared = {name: value for name, value in result.get("parameters", {}).items() if name not in ignored}
        return digest([result.get("name"), compared])

    results = {path.name: change(json.loads(path.read_bytes())) for path in sorted(paths) if path.is_file()}
    new = {identity(result) for result in results.values()}
    for path in list(folder.glob("*-*.json")):
        if identity(json.loads(path.read_bytes())) in new:
            path.unlink()
    for name, result in results.items():
        write_json(folder / name, result)
