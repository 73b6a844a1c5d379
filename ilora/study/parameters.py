"""The parameters of the notebooks: one name, type, meaning and range each, checked before any work.

A notebook's first cell has `name = value` lines, its second calls `start`.
"""

import ast
import difflib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ilora import data
from ilora.artifacts import Run, model_content
from ilora.artifacts import content as folder_content
from ilora.data import REPEATS, WORDS
from ilora.devices import pick_device
from ilora.errors import UserError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


class Parameter(NamedTuple):
    """One notebook parameter: its type, its meaning with unit, and which values are possible."""

    type: type
    meaning: str
    valid: Callable[[Any], bool]
    must: str  # completes the sentence "<name> must be ..."


def _at_least(low: int, meaning: str) -> Parameter:
    return Parameter(int, meaning, lambda value: value >= low, f"at least {low}")


def _one_of(options: Collection[str], meaning: str) -> Parameter:
    return Parameter(str, meaning, lambda value: value in options, f"one of {', '.join(options)}")


def _text(meaning: str, must: str, valid: Callable[[str], bool] = str.strip) -> Parameter:
    return Parameter(str, meaning, valid, must)


def _is_folder(value: str) -> bool:
    return Path(value).expanduser().is_dir()


PARAMETERS: dict[str, Parameter] = {
    "dataset": _one_of(WORDS, "which data set"),
    "data_dir": _text("folder with the data set's files; empty: generate or download", "empty or a folder that exists",
                      lambda value: value == "" or _is_folder(value)),
    "repeats": _one_of(REPEATS, "repeated events of a user and an item: keep or drop them"),
    "results": _text("folder with the results of sweeps", "a folder that exists", _is_folder),
    "conflict": Parameter(float, "world: how far taste groups disagree, 0 to 1", lambda x: 0 <= x <= 1, "from 0 to 1"),
    "users": _at_least(40, "world: number of users"),
    "seed": _at_least(0, "seed of every random choice"),
    "window": _at_least(3, "longest history, items"),
    "base_model": _text("'embedded', 'smollm2', or a Hugging Face causal LM by name or folder",
                        "'embedded', 'smollm2' or the name or folder of a causal language model"),
    "rank": _at_least(1, "LoRA rank r, all experts together"),
    "alpha": Parameter(float, "LoRA alpha", lambda value: 0 < value < float("inf"), "above 0"),
    "dropout": Parameter(float, "LoRA dropout, a share", lambda value: 0 <= value < 1, "from 0 to below 1"),
    "experts": _at_least(1, "number of experts K; a divisor of rank; 1 is LoRA"),
    "gate": _one_of(("linear", "convolutional"), "how the sequence representation becomes expert weights"),
    "guidance": _one_of(("sequence", "random", "token"), "input of the gate: SASRec's state, noise or the prompt"),
    "gate_per_layer": Parameter(bool, "one gate per adapted layer, not one for all", lambda _: True, "True or False"),
    "gate_top_k": Parameter(int, "experts with weight above 0; 0: all", lambda k: k == 0 or k > 1, "0 or at least 2"),
    "epochs": _at_least(1, "passes over the training sequences"),
    "learning_rate": Parameter(float, "peak learning rate", lambda value: 0 < value < 1, "above 0 and below 1"),
    "batch_size": _at_least(1, "sequences per optimiser step"),
    "micro_batch_size": _at_least(1, "sequences in memory at a time; changes results only by rounding"),
    "compile": _one_of(("auto", "yes", "no"), "compile layers for training; auto: on a GPU"),
    "train_limit": _at_least(0, "training sequences used; 0: all"),
    "test_limit": _at_least(0, "test sequences used; 0: all"),
    "gradient_limit": _at_least(0, "training sequences whose gradients are compared; 0: all"),
    "encoder_epochs": _at_least(1, "SASRec: passes over the training users"),
    "eval_windows": _one_of(("last", "all"), "test windows: each user's last, or all"),
    "text_encoder": _text("MoRec: a sentence-transformers model by name or folder", "a name"),
    "chat_url": _text("ChatRec: base URL of an OpenAI-compatible endpoint", "a URL", lambda _: True),
    "chat_model": _text("ChatRec: the model's name there", "a name", lambda _: True),
    "chat_limit": _at_least(1, "ChatRec: number of questions sent to its endpoint"),
    "device": _text("auto, cpu, cuda, cuda:N or mps", "auto, cpu, cuda, cuda:N or mps", bool),
}  # fmt: skip

FOLDERS = ("data_dir", "results", "base_model", "text_encoder")  # parameters that may name one
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, with whole numbers as floats where a float is meant.

    Raises UserError for the first unknown name (suggesting the nearest known one), wrong type (a bool is no number, 4.0
    is no whole number), impossible value, or impossible pair of values.
    """
    _refuse_unknown(given, PARAMETERS)
    values = {name: _check_value(name, value) for name, value in given.items()}
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
        wrong = f"{value!r} ({type(value).__name__}){hint}"
        raise UserError(f"parameter {name!r} must be {_KINDS[parameter.type]}, not {wrong}")
    if not parameter.valid(value):
        raise UserError(f"parameter {name!r} must be {parameter.must}, not {value!r}")
    return value


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
    """The content of what parameters name, for `artifacts.key`; folders are relative to `where`. Raises UserError."""
    from ilora.language.pretraining import base_content  # takes seconds, which `python -m ilora --help` need not

    def place(name: str, value: Any) -> Any:
        folder = where / Path(value).expanduser() if name in FOLDERS and value else None
        return str(folder) if folder and folder.is_dir() else value

    values = {name: place(name, value) for name, value in values.items()}
    contents = {}
    if "dataset" in values:
        names = inspect.signature(data.load).parameters.keys() & values.keys()
        contents["data"] = data.source_key(**{name: values[name] for name in names})
    for name, content in (("base_model", base_content), ("text_encoder", model_content), ("results", folder_content)):
        if name in values:
            contents[name] = content(values[name])
    return contents


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's cell tagged `parameters`, which has only `name = value` lines."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for cell in tagged for line in ast.parse("".join(cell["source"])).body]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def start(name: str, namespace: dict[str, Any]) -> Run:
    """Check a notebook's parameters and start its Run: `run = parameters.start("04_ilora", globals())`.

    Call it in the cell after the one tagged `parameters`; papermill puts its values between the two. In a new kernel
    all text and numbers are parameters at this point; a name that the notebook in the repository lacks is refused.
    Raises UserError.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    known = notebook_parameters(source) if source.is_file() else PARAMETERS
    given = [each for each, value in namespace.items() if isinstance(value, bool | int | float | str | None)]
    unknown = [each for each in given if each not in known and not each.startswith("_")]
    if "run" not in namespace:  # else the cell is run again, and the notebook has other variables
        for each in unknown:
            del namespace[each]  # so that the corrected cell can be run
        _refuse_unknown(unknown, known, f" in {name}")
    values = check_parameters({each: namespace[each] for each in known if each in namespace})
    namespace.update(values)
    return Run(name, values, inputs(values))
