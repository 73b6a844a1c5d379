"""The parameters of the notebooks, from `name = value` lines in their first cells: checked before any work."""

import ast
import contextlib
import difflib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ilora import data
from ilora.artifacts import Run, content, model_content
from ilora.devices import pick_device
from ilora.errors import UserError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
QUANTIZE = ("", "8bit", "4bit") if find_spec("bitsandbytes") else ("",)


class Parameter(NamedTuple):
    """The values that a parameter can have."""

    type: type
    must: str  # completes the sentence "<name> must be ..."
    valid: Callable[[Any], bool]


def _at_least(low: int) -> Parameter:
    return Parameter(int, f"at least {low}", lambda value: value >= low)


def _one_of(*options: str) -> Parameter:
    return Parameter(str, f"one of {', '.join(options)}", lambda value: value in options)


PARAMETERS: dict[str, Parameter] = {  # the notebooks say what they mean
    "dataset": _one_of(*data.WORDS),
    "data_dir": Parameter(str, "empty or a folder that exists", lambda x: x == "" or Path(x).expanduser().is_dir()),
    "repeats": _one_of(*data.REPEATS),
    "results": Parameter(str, "a folder that exists", lambda x: Path(x).is_dir()),
    "conflict": Parameter(float, "from 0 to 1", lambda x: 0 <= x <= 1),
    "users": _at_least(40),
    "window": _at_least(3),
    "base_model": Parameter(str, "'embedded', 'smollm2' or the name or folder of a causal language model", str.strip),
    "alpha": Parameter(float, "above 0", lambda x: 0 < x < float("inf")),
    "dropout": Parameter(float, "from 0 to below 1", lambda x: 0 <= x < 1),
    "gate": _one_of("linear", "convolutional", "clusters"),
    "guidance": _one_of("sequence", "random", "token"),
    **dict.fromkeys(("gate_per_layer", "gradient_checkpointing"), Parameter(bool, "True or False", lambda _: True)),
    "gate_top_k": Parameter(int, "0 or at least 2", lambda x: x == 0 or x > 1),
    "learning_rate": Parameter(float, "above 0 and below 1", lambda x: 0 < x < 1),
    "compile": _one_of("auto", "yes", "no"),
    "quantize": Parameter(str, "empty or, after `pip install bitsandbytes`, 8bit or 4bit", QUANTIZE.__contains__),
    "eval_windows": _one_of("last", "all"),
    "text_encoder": Parameter(str, "a name", str.strip),
    **dict.fromkeys(("chat_url", "chat_model"), Parameter(str, "text", lambda _: True)),
    "device": Parameter(str, "auto, cpu, cuda, cuda:N or mps", bool),
}
AT_LEAST_1 = ("rank", "experts", "epochs", "batch_size", "encoder_epochs", "chat_limit")
AT_LEAST_0 = ("seed", "micro_batch_size", "train_limit", "test_limit", "gradient_limit")
PARAMETERS |= dict.fromkeys(AT_LEAST_1, _at_least(1)) | dict.fromkeys(AT_LEAST_0, _at_least(0))
NEWER = {"micro_batch_size": 32, "gradient_checkpointing": False, "quantize": "", "compile": "auto"}


def check_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, with floats where one is meant. Raises UserError for an unknown name or impossible value."""
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
    pick_device(values.get("device", "auto"))
    return values


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a result names: newer ones only if changed, so that older results keep their names."""
    return {name: value for name, value in values.items() if name not in NEWER or value != NEWER[name]}


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
        raise UserError(f"parameter {name!r} must be {KINDS[parameter.type]}, not {wrong}")
    if not parameter.valid(value):
        raise UserError(f"parameter {name!r} must be {parameter.must}, not {value!r}")
    return value


def parse_parameters(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read `-p NAME VALUE` pairs of a command line by the types in PARAMETERS (checked; UserError)."""
    values = dict(pairs)
    for name, text in values.items():
        if name in PARAMETERS and PARAMETERS[name].type is not str:
            with contextlib.suppress(ValueError, SyntaxError):  # else it stays text, which check_parameters refuses
                values[name] = ast.literal_eval(text)
    return check_parameters(values)


def inputs(values: Mapping[str, Any]) -> dict[str, str]:
    """The content of the data, models and results that parameters name, for `artifacts.key`. Raises UserError."""
    from ilora.language.pretraining import base_content  # takes seconds, which a look at data need not

    contents = {}
    if "dataset" in values:
        names = inspect.signature(data.load).parameters.keys() & values.keys()
        contents["data"] = data.source_key(**{name: values[name] for name in names})
    for name, content_of in (("base_model", base_content), ("text_encoder", model_content), ("results", content)):
        if name in values:
            contents[name] = content_of(values[name])
    return contents


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and defaults in a notebook's cell tagged `parameters`, which has only lines `name = value  # meaning`."""
    cells = json.loads(path.read_bytes())["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def start(name: str, namespace: dict[str, Any]) -> Run:
    """Check a notebook's parameters and start its Run: `run = parameters.start("04_ilora", globals())`.

    Call it in the second cell: until then all text and numbers are parameters. Raises UserError.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    known = notebook_parameters(source) if source.is_file() else PARAMETERS
    if "run" not in namespace:  # else the cell is run again, and the notebook has other variables
        given = [each for each, value in namespace.items() if isinstance(value, bool | int | float | str | None)]
        unknown = [each for each in given if each not in known and not each.startswith("_")]
        for each in unknown:
            del namespace[each]  # so that the corrected cell can be run
        _refuse_unknown(unknown, known, f" in {name}")
    values = check_parameters({each: namespace[each] for each in known if each in namespace})
    namespace.update(values)
    return Run(name, stored(values), inputs(values))
