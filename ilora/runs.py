"""What every run shares: seeds, device, the artifacts folder, one JSON per run."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from ilora.errors import UserError

log = logging.getLogger(__name__)


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


# ---------------------------------------------------------------- seeds and device


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries draw from it
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would put a stack trace aside for each kind of device that is missing: 1 ms a step
        torch.default_generator.manual_seed(seed)


def pick_device(device: str = "auto") -> torch.device:
    """The torch device of that name; `auto` is the GPU if CUDA sees one, else the CPU.  Raises UserError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or (index and not index.isdigit()):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if int(index or 0) >= counts[kind]:
        raise UserError(f"device {device!r} is not on this machine as torch sees it: choose 'auto' or 'cpu'")
    return torch.device(device)


# ---------------------------------------------------------------- files


def home() -> Path:
    """The artifacts folder: $ILORA_HOME, or `artifacts` in the working directory; made if missing."""
    folder = Path(os.environ.get("ILORA_HOME") or "artifacts").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def key(parameters: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 of the parameters as canonical JSON; TypeError on what JSON cannot hold."""
    text = json.dumps(parameters, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file that is either the old one or all of the new one, whatever happens; text is UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON (sorted keys, one space of indent, atomic); numpy values as lists; ValueError on NaN."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False, default=_plain)
    write_atomic(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `path` (replacing it) on success and is removed on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_folder(new: Path, path: Path) -> None:
    """os.replace for folders, which the system refuses when `path` holds files."""
    if not path.exists():
        os.replace(new, path)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        os.replace(path, Path(aside, "old"))
        os.replace(new, path)


def cached(kind: str, parameters: Mapping[str, Any], make: Callable[[Path], None], note: str = "") -> Path:
    """The folder `home()/kind/key(parameters)`; made by `make(folder)` unless it is there.

    A folder appears complete or not at all; `parameters.json` in it says what it was made from.  What must
    outlive an interrupted `make`, such as checkpoints, belongs elsewhere under home().  Runs at the same time
    make it once, the others wait.  All processes of one distributed run call `make`, as training asks of them;
    what the main process made is kept.
    """
    from accelerate import PartialState  # takes seconds, which `python -m ilora --help` need not
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    folder = home() / kind / key(parameters)
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{kind}-{folder.name}") if state.is_main_process else nullcontext():
        if broadcast_object_list([(folder / "parameters.json").is_file()])[0]:  # one process decides for all
            return folder
        log.info("making %s/%s%s", kind, folder.name, f" ({note})" if note else "")
        with atomic_folder(folder) if state.is_main_process else tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary))
            write_json(Path(temporary) / "parameters.json", parameters)
        state.wait_for_everyone()
    return folder


# ---------------------------------------------------------------- one JSON per run


class Run:
    """Wall time and peak memory of a run, from construction (or entering `with`) to its save (or exit)."""

    def __init__(self, name: str = "", parameters: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.parameters = dict(parameters or {})
        self.device = pick_device(self.parameters.get("device", "auto"))
        self.__enter__()

    def __enter__(self) -> "Run":
        self._started, self._stopped = time.perf_counter(), None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start, or until the exit."""
        return (self._stopped or time.perf_counter()) - self._started

    @property
    def peak_memory_mib(self) -> float:
        """GPU: the most torch allocated since the start.  CPU: the most the process ever held.  In MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource  # not on Windows

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def save(
        self, metrics: Mapping[str, Any], outcomes: Mapping[str, Any] | None = None, path: Path | None = None
    ) -> Path:
        """Write `path`, by default `home()/results/<name>-<key>.json`, and return it.

        `metrics` hold counts and intervals beside values; `outcomes` (name -> one value a sequence; a DataFrame
        will do) are what a paired test needs.
        """
        path = path or home() / "results" / f"{self.name}-{key(self.parameters)}.json"
        result = {
            "name": self.name,
            "parameters": self.parameters,
            "metrics": dict(metrics),
            "seconds": round(self.seconds, 1),
            "peak_memory_mib": round(self.peak_memory_mib),
            "device": describe_device(self.device),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "outcomes": {column: list(outcomes[column]) for column in outcomes} if outcomes is not None else {},
        }
        write_json(path, result)
        return path


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type, name and CPU threads of a device, for a result."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    import ilora

    packages = ("torch", "transformers", "peft", "accelerate", "pandas", "numpy")
    return {
        "python": platform.python_version(),
        "ilora": ilora.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def commit() -> str:
    """Git commit of the checkout that the package runs from; `+dirty` if package or notebooks differ."""
    here = Path(__file__).resolve().parent
    if shutil.which("git") is None or not _git(here, "ls-files", "runs.py"):
        return "unknown (not a checkout)"
    changed = _git(here, "status", "--porcelain", "--", ".", "../notebooks")
    return _git(here, "rev-parse", "HEAD") + ("+dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty if it fails, as it does outside a checkout."""
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
