"""Notebooks as runs: their parameters checked before any work, executed by papermill in a new kernel."""

import contextlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ilora import artifacts
from ilora.errors import UserError
from ilora.study.parameters import check_parameters, inputs, notebook_parameters

ROOT = Path(__file__).resolve().parents[2]


class NotebookError(UserError):
    """A notebook failed; `reason` says why in one line."""

    def __init__(self, job: "Job", where: str, reason: str) -> None:
        executed = f"the executed notebook is {job.executed}; the book is unchanged"
        super().__init__(f"{job.source.name} failed{where}\n{executed}\n{reason}")
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """A notebook to run: its source, the parameters that differ from its defaults, and all parameters."""

    source: Path
    given: dict[str, Any]
    parameters: dict[str, Any]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The content of the data and models that the parameters name. Raises UserError."""
        return inputs(self.parameters, ROOT)

    def check(self) -> None:
        """Raise UserError if the data or models cannot be used."""
        _ = self.inputs

    @property
    def result(self) -> Path:
        """Where `Run.save` puts the notebook's result, if it has one."""
        return artifacts.result_path(self.source.stem, self.parameters, self.inputs)

    @property
    def executed(self) -> Path:
        """Where the executed notebook is written."""
        return artifacts.home() / "notebooks" / f"{self.result.stem}.ipynb"

    def run(self, title: str = "") -> None:
        """Execute the notebook, with a progress bar over its cells on stderr. Raises NotebookError."""
        from nbclient.exceptions import DeadKernelError
        from papermill import PapermillExecutionError, execute_notebook
        from traitlets.config import Config

        _prepare_environment()
        self.executed.parent.mkdir(parents=True, exist_ok=True)
        bar = {"desc": title or self.source.stem, "file": sys.stderr, "dynamic_ncols": True}
        options = {"kernel_name": "python3", "cwd": ROOT, "progress_bar": bar}
        options["coalesce_streams"] = True  # text printed in several pieces is one output
        options["config"] = Config(KernelManager={"transport_encryption": "auto"})  # else each kernel warns
        try:
            execute_notebook(self.source, self.executed, self.given, **options)
        except PapermillExecutionError as error:
            where = f" in cell [{error.exec_count}], which begins: {error.source.strip().splitlines()[0]}"
            raise NotebookError(self, where, f"{error.ename}: {error.evalue}".strip()) from error
        except DeadKernelError as error:
            raise NotebookError(self, "", "the kernel died, as it does when memory runs out") from error

    def __str__(self) -> str:
        """The notebook and its parameters, as on a command line."""
        given = [f"-p {name} {shlex.quote(str(value))}" for name, value in self.given.items()]
        return " ".join([self.source.stem, *given])


# ---------------------------------------------------------------- before any work
def local_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose folders, relative to the shell's working directory, are made relative to the repository."""
    folders = {
        name: os.path.relpath(value, ROOT)
        for name, value in given.items()
        if name in ("data_dir", "base_model") and value and not Path(value).is_absolute() and Path(value).is_dir()
    }
    return given | folders


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
    paths = sources()
    for name in only or ():
        if not any(name in (path.stem, path.stem.split("_")[0]) for path in paths):
            names = ", ".join(path.stem for path in paths)
            raise UserError(f"there is no notebook {name!r}: choose among {names}")
    if only:
        paths = [path for path in paths if {path.stem, path.stem.split("_")[0]} & set(only)]
    jobs = []
    for source in paths:
        defaults = notebook_parameters(source)
        changed = {name: value for name, value in given.items() if name in defaults}
        with contextlib.chdir(ROOT):  # folders are named from here
            jobs.append(Job(source, changed, check_parameters(defaults | changed)))
    for name in given:
        if not any(name in job.given for job in jobs):
            names = ", ".join(job.source.stem for job in jobs)
            raise UserError(f"none of the notebooks to run ({names}) has a parameter {name!r}: leave it out")
    return jobs


# ---------------------------------------------------------------- running
def run_all(jobs: list[Job]) -> None:
    """Run the jobs in order. Raises NotebookError at the first that fails."""
    for job in jobs:
        job.check()
    for number, job in enumerate(jobs, 1):
        job.run(f"{job.source.stem} ({number} of {len(jobs)})")


def _prepare_environment() -> None:
    """Variables that the kernels inherit."""
    os.environ["ILORA_HOME"] = str(artifacts.home())
    kernels = str(Path(sys.prefix, "share", "jupyter"))  # its kernel python3 is this environment's
    paths = os.environ.get("JUPYTER_PATH", "").split(os.pathsep)
    os.environ["JUPYTER_PATH"] = os.pathsep.join([kernels, *(path for path in paths if path not in ("", kernels))])
    os.environ.setdefault("PYTHONHASHSEED", "0")  # sets print in one order
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning at kernel start
