"""Notebooks as runs: their parameters checked before any work, executed by papermill in a new kernel."""

import contextlib
import importlib.util
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ilora import artifacts
from ilora.errors import UserError
from ilora.study.parameters import check_parameters, inputs, notebook_parameters, parse_parameters, stored

ROOT = Path(__file__).resolve().parents[2]
# Variables of the kernels: python3 is this environment's, sets print in one order, and no warning of a debugger.
KERNELS = {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
EARLY = ("01", "02", "05", "07")  # start first: 03 and 04 need the SASRec that 02 trains; the rest runs beside 06


@dataclass(frozen=True)
class Job:
    """A notebook to run: its source, the parameters that differ from its defaults, and all parameters."""

    source: Path
    given: dict[str, Any]
    parameters: dict[str, Any]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The content of the data and models that the parameters name. Raises UserError."""
        os.environ["ILORA_HOME"] = str(artifacts.home())  # the kernels inherit it
        with contextlib.chdir(ROOT):  # parameters name folders from here
            return inputs(self.parameters)

    @property
    def result(self) -> Path:
        """Where the notebook's `run.save` puts its result, if it has one."""
        return artifacts.result_path(self.source.stem, self.parameters, self.inputs)

    @property
    def executed(self) -> Path:
        """Where the executed notebook is written."""
        return artifacts.home() / "notebooks" / f"{self.result.stem}.ipynb"

    def run(self, progress: bool = True) -> None:
        """Execute the notebook, with a bar of its cells on stderr if `progress`. Raises UserError."""
        from nbclient.exceptions import DeadKernelError  # optional dependencies
        from papermill import PapermillExecutionError, execute_notebook
        from traitlets.config import Config

        self.executed.parent.mkdir(parents=True, exist_ok=True)
        for name, value in KERNELS.items():
            os.environ.setdefault(name, value)
        bar = {"desc": self.source.stem, "file": sys.stderr, "dynamic_ncols": True} if progress else False
        quiet = Config(KernelManager={"transport_encryption": "auto"})  # else each kernel warns
        more = {"kernel_name": "python3", "cwd": ROOT, "progress_bar": bar, "config": quiet, "coalesce_streams": True}
        try:  # an orderly end of the kernel would take two seconds
            execute_notebook(self.source, self.executed, self.given, shutdown_kernel="immediate", **more)
        except PapermillExecutionError as error:
            where = f" in cell [{error.exec_count}], which begins: {error.source.strip().splitlines()[0]}"
            raise self._failure(where, f"{error.ename}: {error.evalue}".strip()) from error
        except DeadKernelError as error:
            raise self._failure("", "the kernel died, as it does when memory runs out") from error

    def _failure(self, where: str, reason: str) -> UserError:
        executed = f"the executed notebook is {self.executed}; the book was not built"
        error = UserError(f"{self.source.name} failed{where}\n{executed}\n{reason}")
        error.reason = reason  # for `runner.attempt`
        return error

    def __str__(self) -> str:
        """The notebook and its parameters, as on a command line."""
        given = [f"-p {name} {shlex.quote(str(value))}" for name, value in self.given.items()]
        return " ".join([self.source.stem, *given])


def local_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose folders, relative to the shell's working directory, are made relative to the repository."""
    texts = {name: given[name] for name in ("data_dir", "base_model") if given.get(name)}
    relative = {name: text for name, text in texts.items() if Path(text).is_dir() and not Path(text).is_absolute()}
    return given | {name: os.path.relpath(folder, ROOT) for name, folder in relative.items()}


def sources() -> list[Path]:
    """The notebooks in their order. Raises UserError if there are none, as in an installed package."""
    paths = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        raise UserError(f"there are no notebooks in {ROOT}: run python -m ilora in a clone of the repository")
    if not importlib.util.find_spec("papermill"):
        raise UserError("there is no papermill: pip install -e '.[notebooks,book]' in the repository")
    return paths


def plan(given: dict[str, Any], only: Sequence[str] | None) -> list[Job]:
    """A job with checked parameters for each notebook, or each in `only` ("04" or "04_ilora"). Raises UserError."""
    by_name = {name: path for path in sources() for name in (path.stem.split("_")[0], path.stem)}
    for name in only or ():
        if name not in by_name:
            raise UserError(f"there is no notebook {name!r}: choose among {', '.join(by_name)}")
    jobs = []
    for source in sorted({by_name[name] for name in only or by_name}):
        defaults = notebook_parameters(source)
        changed = {name: value for name, value in given.items() if name in defaults}
        with contextlib.chdir(ROOT):  # parameters name folders from here
            jobs.append(Job(source, changed, stored(check_parameters(defaults | changed))))
    for name in given:
        if not any(name in job.given for job in jobs):
            raise UserError(f"no notebook of this run has a parameter {name!r}: leave it out")
    return jobs


def points(notebook: str, given: dict[str, Any], over: Sequence[Sequence[str]]) -> list[Job]:
    """One checked job for each point of a grid; the last parameter changes fastest. Raises UserError."""
    names = [name for name, *_ in over]
    for name, *values in over:
        if not values:
            raise UserError(f"--over {name} names no values: give at least one")
        if names.count(name) > 1 or name in given:
            raise UserError(f"parameter {name!r} is given twice: name it once, in --over or in -p")
    grid = itertools.product(*(values for _, *values in over))
    points = [parse_parameters(zip(names, values, strict=True)) for values in grid]
    return [job for point in points for job in plan(given | local_paths(point), [notebook])]


def run_all(jobs: list[Job]) -> None:
    """Run the jobs, on a CPU two at a time. Raises UserError if one fails, or first if data or models are unusable."""
    for job in jobs:
        _ = job.inputs
    several = len(jobs) > 1 and not torch.cuda.is_available()  # whose memory may not hold two models
    if several:
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))  # of each kernel
    waiting = iter(sorted(jobs, key=lambda job: not job.source.name.startswith(EARLY)))  # which the threads share

    def work() -> None:
        for job in waiting:  # a failure ends this thread
            job.run(not several)
            bar.update()

    bar = tqdm(total=len(jobs), unit="notebook", smoothing=0)
    with contextlib.chdir(ROOT), bar, ThreadPoolExecutor() as pool:
        threads = [pool.submit(work) for _ in range(1 + several)]
        try:
            for thread in as_completed(threads):
                thread.result()
        except BaseException:
            while not all(thread.done() for thread in threads):  # one may only now start its kernel
                for kernel in psutil.Process().children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        kernel.kill()
                time.sleep(0.1)
            raise
