"""The parameters of the notebooks: one name, type, meaning and range each, checked before any work.

A notebook's first cell holds `name = value` lines, its second calls `start`; papermill puts between the two what its
command line gives. A wrong parameter ends in one sentence.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilora import data
from ilora.artifacts import Run, model_content
from ilora.artifacts import content as folder_content
from ilora.data.dataset import REPEATS, WORDS
from ilora.devices import pick_device
from ilora.errors import UserError


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
    "dataset": _one_of(WORDS, "which data set"),
    "data_dir": Parameter(
        str,
        "folder with the data set's files; empty: generate or download",
        lambda value: value == "" or Path(value).expanduser().is_dir(),
        "empty or a folder that exists",
    ),
    "repeats": _one_of(REPEATS, "events of an item that the user chose before: keep or drop them"),
    "results": Parameter(
        str, "folder with the results of sweeps", lambda value: Path(value).is_dir(), "a folder that exists"
    ),
    "conflict": Parameter(
        float, "world: how far taste groups disagree, 0 to 1", lambda value: 0 <= value <= 1, "from 0 to 1"
    ),
    "users": _at_least(40, "world: number of users"),
    "seed": _at_least(0, "seed of every random choice"),
    "window": _at_least(3, "longest history, items"),
    "base_model": Parameter(
        str,
        "'embedded', 'smollm2', or a Hugging Face causal LM by name or folder",
        lambda value: bool(value.strip()),
        "'embedded', 'smollm2' or the name or folder of a causal language model",
    ),
    "rank": _at_least(1, "LoRA rank r, all experts together"),
    "alpha": Parameter(float, "LoRA alpha", lambda value: 0 < value < float("inf"), "above 0"),
    "dropout": Parameter(float, "LoRA dropout, a share", lambda value: 0 <= value < 1, "from 0 to below 1"),
    "experts": _at_least(1, "number of experts K; a divisor of rank; 1 is LoRA"),
    "gate": _one_of(("linear", "convolutional"), "how the sequence representation becomes expert weights"),
    "guidance": _one_of(("sequence", "random", "token"), "what the gate reads: SASRec's state, noise or the prompt"),
    "gate_per_layer": Parameter(
        bool, "a gate for each adapted layer, instead of one for all", lambda _: True, "True or False"
    ),
    "gate_top_k": Parameter(
        int, "experts with weight for one history; 0: all", lambda value: value == 0 or value > 1, "0 or at least 2"
    ),
    "epochs": _at_least(1, "passes over the training sequences"),
    "learning_rate": Parameter(float, "peak learning rate", lambda value: 0 < value < 1, "above 0 and below 1"),
    "batch_size": _at_least(1, "sequences per optimiser step"),
    "micro_batch_size": _at_least(1, "sequences at once on a device; changes a result by rounding alone"),
    "compile": _one_of(("auto", "yes", "no"), "compile layers for training; auto: on a GPU"),
    "train_limit": _at_least(0, "training sequences used; 0: all"),
    "test_limit": _at_least(0, "test sequences used; 0: all"),
    "gradient_limit": _at_least(0, "training sequences whose gradients are compared; 0: all"),
    "encoder_epochs": _at_least(1, "SASRec: passes over the training users"),
    "eval_windows": _one_of(("last", "all"), "test windows: each user's last, or all"),
    "text_encoder": Parameter(
        str, "MoRec: a sentence-transformers model by name or folder", lambda value: bool(value.strip()), "a name"
    ),
    "chat_url": Parameter(str, "ChatRec: base URL of an OpenAI-compatible endpoint", lambda value: True, "a URL"),
    "chat_model": Parameter(str, "ChatRec: the model's name there", lambda value: True, "a name"),
    "chat_limit": _at_least(1, "ChatRec: how many of the questions its endpoint is asked"),
    "device": Parameter(str, "auto, cpu, cuda, cuda:N or mps", bool, "auto, cpu, cuda, cuda:N or mps"),
}

FOLDERS = ("data_dir", "results", "base_model", "text_encoder")  # parameters that may name one
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


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
    if "experts" in values and (top_k := values.get("gate_top_k", 0)) > experts:
        raise UserError(f"gate_top_k = {top_k} keeps more than experts = {experts}: choose at most that many, or 0")
    if values.get("dataset") in ("csv", "llara") and values.get("data_dir") == "":
        raise UserError(f"dataset = {values['dataset']!r} needs data_dir, the folder that holds its files")
    if "device" in values:
        pick_device(values["device"])


def parse_parameters(pairs: Collection[tuple[str, str]]) -> dict[str, Any]:
    """Read `-p NAME VALUE` pairs of a command line by the types in PARAMETERS (checked; UserError)."""
    return check_parameters({name: _parse(name, text) for name, text in pairs})


def _parse(name: str, text: str) -> Any:
    kind = PARAMETERS[name].type if name in PARAMETERS else str
    if kind is bool:
        return {"True": True, "False": False}.get(text, text)  # as papermill reads them; bool("False") is True
    try:
        return kind(text)
    except ValueError:
        return text  # not of its type: check_parameters says so


def inputs(values: Mapping[str, Any], where: Path = Path()) -> dict[str, str]:
    """What parameters name, by content, for `artifacts.key`; folders are named from `where`.  Raises UserError."""
    from ilora.language.pretraining import base_content  # takes seconds, which `python -m ilora --help` need not

    values = {name: _place(value, where) if name in FOLDERS else value for name, value in values.items()}
    found = {}
    if "dataset" in values:
        names = inspect.signature(data.load).parameters.keys() & values.keys()
        found["data"] = data.source_key(**{name: values[name] for name in names})
    for name, content in (("base_model", base_content), ("text_encoder", model_content), ("results", folder_content)):
        if name in values:
            found[name] = content(values[name])
    return found


def _place(value: str, where: Path) -> str:
    """A folder as seen from the working directory; what is no folder in `where` stays as it is."""
    folder = where / Path(value).expanduser()
    return str(folder) if value and folder.is_dir() else value


def start(name: str, namespace: dict[str, Any]) -> Run:
    """Check a notebook's parameters and start its Run; `parameters.start("04_ilora", globals())`.

    Belongs in the cell right after the cell tagged `parameters`; papermill puts the names it injects between
    the two.  Reads both cells from IPython's history, so that a misspelt name is seen.  Raises UserError.
    """
    own, injected = _parameter_cells(namespace.get("In", []))
    _refuse_unknown(own, PARAMETERS, f" in {name}")
    _refuse_unknown(injected, own, f" in {name}")
    values = check_parameters({known: namespace[known] for known in PARAMETERS if known in namespace})
    namespace.update(values)
    return Run(name, values, inputs(values))


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
