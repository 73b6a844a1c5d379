"""What every run shares: the artifacts folder and its keys, files that are whole or absent, one JSON per run."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from ilora.devices import describe_device, pick_device
from ilora.errors import UserError

log = logging.getLogger(__name__)


def home() -> Path:
    """The artifacts folder: $ILORA_HOME, or `artifacts` in the working directory; made if missing."""
    folder = Path(os.environ.get("ILORA_HOME") or "artifacts").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(value: Any) -> str:
    """12 hex digits of the sha256 of `value` as canonical JSON; TypeError on what JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def ingredients(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what is kept: the package version, the content of the inputs, and the settings."""
    import ilora

    if missing := [name for name, content in inputs.items() if not content]:
        raise ValueError(f"no key without the content of {missing[0]!r}: results of other inputs could be reused")
    return {"version": ilora.__version__, "inputs": dict(inputs), "settings": dict(settings)}


def key(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key under which anything is kept: 12 hex digits of its `ingredients`.

    settings: whatever changes the result, as JSON; inputs: what it is made from, by content: a data set's key,
    `content` of files, `model_content` of a model.
    """
    return digest(ingredients(settings, inputs))


def content(path: str | Path) -> str:
    """Digest of a file, or of all files in a folder and their names; hidden files and *.md do not count."""
    path = Path(path)
    if path.is_file():
        about = path.stat()
        return _file_digest(path.resolve(), about.st_size, about.st_mtime_ns)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".md"]
    named = {file.relative_to(path).as_posix(): file for file in files}
    return digest({name: content(file) for name, file in named.items() if "/." not in f"/{name}"})


def _file_digest(path: Path, size: int, modified: int) -> str:
    if size < 2**20:  # a clock tick may pass between two versions of a small file
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _large_file_digest(path, size, modified)


@cache
def _large_file_digest(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_content(name: str) -> str:
    """What the name of a model stands for: the content of a folder, or the commit of a model on the hub.

    Raises UserError if the commit is neither on the hub nor in the local cache.
    """
    return content(name) if Path(name).is_dir() else hub_commit(name)


def revision(name: str | Path) -> dict[str, str]:
    """Argument of `from_pretrained` that loads the model of the key, even if the hub moves on."""
    return {} if Path(name).is_dir() else {"revision": hub_commit(str(name))}


@cache
def hub_commit(name: str) -> str:
    """The commit that a model's name stands for on the Hugging Face hub or, offline, in the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name  # .../snapshots/<commit>/config.json
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {name!r} is no folder, and its commit on the Hugging Face hub cannot be read "
            f"({str(error).splitlines()[0]}): name a folder or a model of the hub, and be online the first time"
        ) from error


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


def cached(
    kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], make: Callable[[Path], None], note: str = ""
) -> Path:
    """The folder `home()/kind/key(settings, inputs)`; made by `make(folder)` unless it is there.

    A folder appears complete or not at all; `parameters.json` in it holds its `ingredients`.  What must
    outlive an interrupted `make`, such as checkpoints, belongs elsewhere under home().  Runs at the same time
    make it once, the others wait.  All processes of one distributed run call `make`, as training asks of them;
    what the main process made is kept.
    """
    from accelerate import PartialState  # takes seconds, which `python -m ilora --help` need not
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    folder = home() / kind / key(settings, inputs)
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{kind}-{folder.name}") if state.is_main_process else nullcontext():
        if broadcast_object_list([(folder / "parameters.json").is_file()])[0]:  # one process decides for all
            return folder
        log.info("making %s/%s%s", kind, folder.name, f" ({note})" if note else "")
        with atomic_folder(folder) if state.is_main_process else tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary))
            write_json(Path(temporary) / "parameters.json", ingredients(settings, inputs))
        state.wait_for_everyone()
    return folder


def result_path(name: str, parameters: Mapping[str, Any], inputs: Mapping[str, str]) -> Path:
    """Where the result of a run is kept."""
    return home() / "results" / f"{name}-{key(parameters, inputs)}.json"


class Run:
    """Wall time and peak memory of a run, from construction (or entering `with`) to its save (or exit).

    inputs: the content of what the parameters name, see `key`.
    """

    def __init__(
        self, name: str = "", parameters: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.parameters, self.inputs = dict(parameters or {}), dict(inputs or {})
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
        """Write `path`, by default `result_path` of this run, and return it.

        `metrics` hold counts and intervals beside values; `outcomes` (name -> one value a sequence; a DataFrame
        will do) are what a paired test needs.
        """
        path = path or result_path(self.name, self.parameters, self.inputs)
        result = {
            "name": self.name,
            "parameters": self.parameters,
            "inputs": self.inputs,
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
    if shutil.which("git") is None or not _git(here, "ls-files", "artifacts.py"):
        return "unknown (not a checkout)"
    changed = _git(here, "status", "--porcelain", "--", ".", "../notebooks")
    return _git(here, "rev-parse", "HEAD") + ("+dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty if it fails, as it does outside a checkout."""
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
