"""The artifacts folder: keys of stored results, atomic writing of files and folders, and one JSON per run."""

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import PartialState, utils
from filelock import FileLock

import ilora
from ilora.devices import peak_memory_mib, pick_device
from ilora.errors import UserError

log = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "pandas", "numpy")  # results depend on their versions


def home() -> Path:
    """The artifacts folder: $ILORA_HOME, or `artifacts` in the working directory; created.  Raises UserError."""
    folder = Path(os.environ.get("ILORA_HOME") or "artifacts").expanduser().resolve()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"artifacts cannot be kept in {folder}: set ILORA_HOME to a folder that you can write to")
    return folder


def digest(value: Any) -> str:
    """12 hex digits of the sha256 of `value` as canonical JSON.  Raises TypeError if it is not JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _ingredients(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a key depends on."""
    return {"version": ilora.__version__, "inputs": dict(inputs), "settings": dict(settings)}


def key(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of a stored result: 12 hex digits.  inputs: name -> the key of data, or `content` or `model_content`."""
    return digest(_ingredients(settings, inputs))


def content(path: str | Path) -> str:
    """Digest of a file, or of the names and contents of a folder's files, except hidden files and *.md."""
    path = Path(path)
    if path.is_file():
        about = path.stat()
        if about.st_size < 2**20:  # not cached: a small file may change twice within one tick of the clock
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return _large_file_digest(path.resolve(), about.st_size, about.st_mtime_ns)
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.suffix != ".md"]
    return digest({file.as_posix(): content(path / file) for file in files if "/." not in f"/{file.as_posix()}"})


@cache
def _large_file_digest(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_content(name: str) -> str:
    """The content of a model's folder, or the commit of a model on the hub, see `hub_commit`."""
    return content(name) if Path(name).is_dir() else hub_commit(name)


def revision(name: str | Path) -> dict[str, str]:
    """The argument of `from_pretrained` that loads the commit which the key names."""
    return {} if Path(name).is_dir() else {"revision": hub_commit(str(name))}


@cache
def hub_commit(name: str) -> str:
    """The current commit of a model on the Hugging Face hub or, offline, in the local cache.  Raises UserError."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent.name  # snapshots/<commit>/config.json
    except (OSError, ValueError) as error:
        problem = f"model {name!r} is no folder, and not found on the hub ({str(error).splitlines()[0]})"
        raise UserError(f"{problem}: check the name, be online, and log in (hf auth login) if it is gated") from error


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield a place for a new file or folder, which replaces `path` on success and is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary, "new")
        yield new
        for file in filter(Path.is_file, (new, *new.rglob("*"))):
            with open(file, "rb") as opened:
                os.fsync(opened)
        if path.is_dir():  # a folder that holds files cannot be replaced
            path.replace(Path(temporary, "old"))
        new.replace(path)


@contextmanager
def atomic_folder(path: str | Path, mark: str = "parameters.json") -> Iterator[Path]:
    """Yield an empty folder that replaces `path` on success; UserError if that holds files, but none called `mark`."""
    if Path(path).is_dir() and any(Path(path).iterdir()) and not Path(path, mark).is_file():
        raise UserError(f"{path} holds other files than a saved folder with {mark}: name a new or empty folder")
    with _replacement(Path(path)) as folder:
        folder.mkdir()
        yield folder


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file completely or not at all; text is UTF-8.  Raises UserError if that fails, as on a full disk."""
    try:
        with _replacement(Path(path)) as file:
            file.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): make room and start again") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with `write_atomic`; numpy arrays become lists.  Raises ValueError on NaN."""
    options = {"indent": 1, "sort_keys": True, "allow_nan": False, "ensure_ascii": False}
    write_atomic(path, json.dumps(value, default=lambda array: array.tolist(), **options) + "\n")


def cached(kind: str, settings: Mapping, inputs: Mapping, make: Callable[[Path, Path], None], note: str = "") -> Path:
    """The folder `home()/kind/key(settings, inputs)`; `make(folder, work)` fills it unless it exists.

    The folder appears complete or not at all; its parameters.json records what the key depends on. Other runs wait for
    the one that calls `make`. All processes of a distributed run call it; the main process's folder is kept.
    `work`, removed once the folder exists, is for what an interrupted run resumes from.
    """
    state, folder = PartialState(), home() / kind / key(settings, inputs)
    work = home() / "training" / folder.name
    with FileLock(home() / "locks" / f"{kind}-{folder.name}") if state.is_main_process else nullcontext():
        if not utils.broadcast_object_list([(folder / "parameters.json").is_file()])[0]:  # one process decides for all
            log.info("making %s/%s%s", kind, folder.name, f" ({note})" if note else "")
            with atomic_folder(folder) if state.is_main_process else tempfile.TemporaryDirectory() as temporary:
                make(Path(temporary), work)
                write_json(Path(temporary) / "parameters.json", _ingredients(settings, inputs))
            state.wait_for_everyone()
    shutil.rmtree(work, ignore_errors=True)
    return folder


def result_path(name: str, parameters: Mapping[str, Any], inputs: Mapping[str, str]) -> Path:
    """The file in which `Run.save` stores a result."""
    return home() / "results" / f"{name}-{key(parameters, inputs)}.json"


class Run:
    """Measures wall time and peak memory of a run and saves its result.  inputs: see `key`."""

    def __init__(self, name: str, parameters: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> None:
        self.name, self.parameters, self.inputs = name, dict(parameters), dict(inputs or {})
        self.device, self.started = pick_device(self.parameters.get("device", "auto")), time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def save(self, metrics: Mapping[str, Any], outcomes: Mapping | None = None, path: Path | None = None) -> Path:
        """Write metrics and outcomes (a DataFrame, or name -> a value per question) to `path` or `result_path`."""
        path = path or result_path(self.name, self.parameters, self.inputs)
        result = {"name": self.name, "parameters": self.parameters, "inputs": self.inputs, "metrics": dict(metrics)}
        cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu
        result["device"] = {"type": self.device.type, "name": device, "threads": torch.get_num_threads()}
        result["seconds"] = round(time.perf_counter() - self.started, 1)
        result["versions"] = {"python": platform.python_version(), "ilora": ilora.__version__}
        result["versions"] |= {package: version(package) for package in PACKAGES}
        result |= {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        result["peak_memory_mib"] = round(peak_memory_mib(self.device))
        write_json(path, result | {"outcomes": {} if outcomes is None else dict(outcomes)})
        return path


def commit() -> str:
    """Git commit of the checkout that the package runs from; `+dirty` if package or notebooks are changed."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    if shutil.which("git") is None or not git(["git", "ls-files", "artifacts.py"]).stdout:
        return "unknown (not a checkout)"
    changed = git(["git", "status", "--porcelain", "--", ".", "../notebooks"]).stdout
    return git(["git", "rev-parse", "HEAD"]).stdout.strip() + ("+dirty" if changed else "")
