"""What every run shares: checked parameters, seeds, device, the artifacts folder, one JSON per run."""

import ast
import difflib
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what is wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and papermill show: the sentence alone, no stack."""
        return [f"{type(self).__name__}: {self}"]


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameter:
    """One notebook parameter: its type, its meaning with unit, and which values are possible."""

    type: type
    meaning: str
    valid: Callable[[Any], bool]
    must: str  # completes the sentence "<name> must be ..."


def _at_least(low: int, meaning: str) -> Parameter:
    return Parameter(int, meaning, lambda value: value >= low, f"at least {low}")


def _one_of(options: Collection[str], meaning: str) -> Parameter:
    return Parameter(str, meaning, lambda value: value in options, f"one of {', '.join(options)}")


PARAMETERS: dict[str, Parameter] = {
    "dataset": _one_of(("world", "movielens", "lastfm", "steam", "llara", "csv"), "which data set"),
    "data_dir": Parameter(
        str,
        "folder with the data set's files; empty: generate or download",
        lambda value: value == "" or Path(value).expanduser().is_dir(),
        "empty or a folder that exists",
    ),
    "conflict": Parameter(
        float, "world: how far taste groups disagree, 0 to 1", lambda value: 0 <= value <= 1, "from 0 to 1"
    ),
    "users": _at_least(40, "world: number of users"),
    "seed": _at_least(0, "seed of every random choice"),
    "window": _at_least(3, "longest history, items"),
    "base_model": Parameter(
        str,
        "'embedded', or a Hugging Face causal LM by name or folder",
        lambda value: bool(value.strip()),
        "'embedded' or the name or folder of a causal language model",
    ),
    "rank": _at_least(1, "LoRA rank r, all experts together"),
    "alpha": Parameter(float, "LoRA alpha", lambda value: 0 < value < float("inf"), "above 0"),
    "dropout": Parameter(float, "LoRA dropout, a share", lambda value: 0 <= value < 1, "from 0 to below 1"),
    "experts": _at_least(1, "number of experts K; a divisor of rank; 1 is LoRA"),
    "gate": _one_of(("linear", "convolutional"), "how the sequence representation becomes expert weights"),
    "epochs": _at_least(1, "passes over the training sequences"),
    "learning_rate": Parameter(float, "peak learning rate", lambda value: 0 < value < 1, "above 0 and below 1"),
    "batch_size": _at_least(1, "sequences per optimiser step"),
    "train_limit": _at_least(0, "training sequences used; 0: all"),
    "test_limit": _at_least(0, "test sequences used; 0: all"),
    "gradient_limit": _at_least(0, "training sequences whose gradients are compared; 0: all"),
    "encoder_epochs": _at_least(1, "SASRec: passes over the training users"),
    "eval_windows": _one_of(("last", "all"), "test windows: each user's last, or all"),
    "device": Parameter(str, "auto, cpu, cuda, cuda:N or mps", bool, "auto, cpu, cuda, cuda:N or mps"),
}

_KINDS = {int: "a whole number", float: "a number", str: "text"}


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with whole numbers made floats where floats are meant.

    Raises UserError on the first unknown name (offering the nearest known one), wrong type (a bool is no
    number, 4.0 is no whole number) or impossible value.
    """
    _refuse_unknown(given, PARAMETERS)
    values = {name: _check_value(name, value) for name, value in given.items()}
    _check_together(values)
    return values


def _refuse_unknown(names: Iterable[str], known: Collection[str], where: str = "") -> None:
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            offer = f"did you mean {nearest[0]!r}?" if nearest else f"the parameters are {', '.join(known)}"
            raise UserError(f"there is no parameter {name!r}{where}: {offer}")


def _check_value(name: str, value: Any) -> Any:
    parameter = PARAMETERS[name]
    if parameter.type is float and type(value) is int:
        value = float(value)
    if type(value) is not parameter.type:
        hint = f" (papermill: -r {name} {value} passes text)" if parameter.type is str else ""
        is_ = f"not {value!r} ({type(value).__name__})"
        raise UserError(f"parameter {name!r} must be {_KINDS[parameter.type]}, {is_}{hint}")
    if not parameter.valid(value):
        raise UserError(f"parameter {name!r} must be {parameter.must}, not {value!r}")
    return value


def _check_together(values: Mapping[str, Any]) -> None:
    rank, experts = values.get("rank", 0), values.get("experts", 1)
    if rank % experts:
        divisors = ", ".join(str(k) for k in range(1, rank + 1) if rank % k == 0)
        raise UserError(f"experts = {experts} does not divide rank = {rank}: choose experts among {divisors}")
    if values.get("dataset") in ("csv", "llara") and values.get("data_dir") == "":
        raise UserError(f"dataset = {values['dataset']!r} needs data_dir, the folder that holds its files")
    if "device" in values:
        pick_device(values["device"])


def parse_parameters(pairs: Collection[tuple[str, str]]) -> dict[str, Any]:
    """Read `-p NAME VALUE` pairs of a command line by the types in PARAMETERS (checked; UserError)."""
    return check_parameters({name: _parse(name, text) for name, text in pairs})


def _parse(name: str, text: str) -> Any:
    kind = PARAMETERS[name].type if name in PARAMETERS else str
    try:
        return kind(text)
    except ValueError:
        return text  # not of its type: check_parameters says so


def start(name: str, namespace: dict[str, Any]) -> "Run":
    """Check a notebook's parameters and start its Run; `runs.start("04_ilora", globals())`.

    Belongs in the cell right after the cell tagged `parameters`; papermill puts the names it injects between
    the two.  Reads both cells from IPython's history, so that a misspelt name is seen.  Raises UserError.
    """
    own, injected = _parameter_cells(namespace.get("In", []))
    _refuse_unknown(own, PARAMETERS, f" in {name}")
    _refuse_unknown(injected, own, f" in {name}")
    values = check_parameters({known: namespace[known] for known in PARAMETERS if known in namespace})
    namespace.update(values)
    return Run(name, values)


def _parameter_cells(history: list[str]) -> tuple[list[str], list[str]]:
    """Names set by the parameters cell and by papermill's cell, which are the last before the current one."""
    cells = history[1:-1]
    injected = _assigned(cells.pop()) if cells and cells[-1].startswith("# Parameters\n") else []
    own = _assigned(cells[-1]) if cells else []
    return (own if PARAMETERS.keys() & own else []), injected  # else: this cell was run again, after others


def _assigned(cell: str) -> list[str]:
    """The names in a cell of nothing but `name = value` lines; none for any other cell."""
    try:
        lines = ast.parse(cell).body
    except SyntaxError:  # a cell of IPython magic
        return []
    if not all(isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) for line in lines):
        return []
    return [line.targets[0].id for line in lines]


# ---------------------------------------------------------------- seeds and device


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries draw from it
    torch.manual_seed(seed)


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
    outlive an interrupted `make`, such as checkpoints, belongs elsewhere under home().
    """
    folder = home() / kind / key(parameters)
    if (folder / "parameters.json").is_file():
        return folder
    log.info("making %s/%s%s", kind, folder.name, f" ({note})" if note else "")
    with atomic_folder(folder) as temporary:
        make(temporary)
        write_json(temporary / "parameters.json", parameters)
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

    def save(self, metrics: Mapping[str, Any], outcomes: Mapping[str, Any] | None = None) -> Path:
        """Write this run's result; see save_result."""
        return save_result(self.name, self.parameters, metrics, outcomes, self)


def save_result(
    name: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
    outcomes: Mapping[str, Any] | None = None,
    run: Run | None = None,
) -> Path:
    """Write `home()/results/<name>-<key>.json` and return its path.

    `metrics` hold counts and intervals beside values; `outcomes` (name -> one value a sequence; a DataFrame
    will do) are what a paired test needs; seconds and peak memory are `run`'s, and null without one.
    """
    device = run.device if run else pick_device(parameters.get("device", "auto"))
    path = home() / "results" / f"{name}-{key(parameters)}.json"
    result = {
        "name": name,
        "parameters": dict(parameters),
        "metrics": dict(metrics),
        "seconds": round(run.seconds, 1) if run else None,
        "peak_memory_mib": round(run.peak_memory_mib) if run else None,
        "device": describe_device(device),
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
