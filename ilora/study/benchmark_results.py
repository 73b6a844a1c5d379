"""Results of the benchmarks as tables: how many times one way's time another one takes, and whether that is the goal.

A benchmark's JSON has parts (`metrics`), a part has ways, and `to` names the one that the others' ratios are to. A way
may have a goal, {"at_least": number} or {"at_most": number}, of the median of its ratio.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ilora.runs import UserError

Results = Mapping[str, Mapping[str, Any]]
PLACE = ["benchmark", "part"]
MEASURED = ["value", "low", "high"]


def read(folder: str | Path) -> dict[str, dict]:
    """Each benchmark's result, by its file's name, such as "language_cpu".  Raises UserError if there are none."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}
    if not found:
        raise UserError(f"{folder} holds no results: make them with make bench")
    return found


def provenance(results: Results) -> pd.DataFrame:
    """Where each result comes from: processor and its threads, versions, commit, day, and how long it took."""
    rows = {
        name: {
            "device": result["device"]["name"],
            "threads": result["device"]["threads"],
            **{package: result["versions"][package] for package in ("torch", "transformers", "peft")},
            "commit": result["commit"][:10] + "+dirty" * result["commit"].endswith("+dirty"),
            "day": result["date"][:10],
            "minutes": round(result["seconds"] / 60, 1),
        }
        for name, result in results.items()
    }
    return pd.DataFrame(rows).T.rename_axis("benchmark")


def parts(results: Results) -> Iterator[tuple[str, str, dict]]:
    """Benchmark, part, and what was found in it; parts that failed are left out, see `failures`."""
    for name, result in results.items():
        for part, found in result["metrics"].items():
            if "error" not in found:
                yield name, part, found


def failures(results: Results) -> pd.DataFrame:
    """Parts that could not be measured, and why."""
    rows = [
        (name, part, found["error"])
        for name, result in results.items()
        for part, found in result["metrics"].items()
        if "error" in found
    ]
    return pd.DataFrame(rows, columns=[*PLACE, "error"]).set_index(PLACE)


def ratios(results: Results) -> pd.DataFrame:
    """A row for each way that another one is compared with.

    value, low, high: median and quartiles of its time over that of the way `to`; seconds of both;
    goal in words, `aim` as a number; met: True or False, None without a goal. A result of before a goal was stated
    is judged by the one that others state for the same part and way.
    """
    goals = {
        (part, way): goal(value)
        for _, part, found in parts(results)
        for way, value in found.items()
        if isinstance(value, dict) and goal(value)
    }
    rows = []
    for name, part, found in parts(results):
        ways = {way: value for way, value in found.items() if isinstance(value, dict) and "time_ratio" in value}
        first = reference(found)
        for way in [way for way in ways if first and way != first]:
            ratio, aim = ways[way]["time_ratio"], goals.get((part, way))
            row = {"benchmark": name, "part": part, "way": way, "to": first, "rows": found.get("rows")}
            row |= {"seconds": ways[way]["seconds"]["median"], "seconds_to": ways[first]["seconds"]["median"]}
            row |= {"value": ratio["median"], "low": ratio["low"], "high": ratio["high"]}
            rows.append(row | judged(ratio["median"], aim))
    columns = [*PLACE, "way", "to", "rows", "seconds", "seconds_to", *MEASURED, "goal", "aim", "met"]
    return pd.DataFrame(rows, columns=columns).set_index([*PLACE, "way"])


def reference(found: Mapping[str, Any]) -> str | None:
    """The way that a part's ratios are to: `to`, or in a result that does not name it the one that is always 1."""
    ways = {
        way: value["time_ratio"] for way, value in found.items() if isinstance(value, dict) and "time_ratio" in value
    }
    return found.get("to") or next((way for way, ratio in ways.items() if set(ratio.values()) == {1.0}), None)


def goal(found: Mapping[str, Any]) -> tuple[str, float] | None:
    """ "at_least" or "at_most", and the number."""
    return next(((kind, found[kind]) for kind in ("at_least", "at_most") if kind in found), None)


def judged(value: float, aim: tuple[str, float] | None) -> dict[str, Any]:
    if aim is None:
        return {"goal": "", "aim": np.nan, "met": None}
    kind, number = aim
    met = value >= number if kind == "at_least" else value <= number
    return {"goal": f"{kind.replace('_', ' ')} {number:g}", "aim": number, "met": bool(met)}


def limits(results: Results) -> pd.DataFrame:
    """Measurements of one way that have a goal: value, its 95 % interval where there is one, goal, met."""
    rows = [
        {"benchmark": name, "part": part, "what": what, **{key: value.get(key) for key in MEASURED}}
        | judged(value["value"], goal(value))
        for name, part, found in parts(results)
        for what, value in found.items()
        if isinstance(value, dict) and "value" in value
    ]
    columns = [*PLACE, "what", *MEASURED, "goal", "aim", "met"]
    return pd.DataFrame(rows, columns=columns).set_index([*PLACE, "what"])


def agreement(results: Results) -> pd.DataFrame:
    """What the ways of a part have in common, in words: the same answers, or how large the largest difference is."""
    rows = [
        (name, part, what, f"{value:.2g}" if isinstance(value, float) else str(value))
        for name, part, found in parts(results)
        for what, value in found.get("agreement", {}).items()
    ]
    return pd.DataFrame(rows, columns=[*PLACE, "what", "value"]).set_index([*PLACE, "what"])


def steps(results: Results) -> pd.DataFrame:
    """Training steps of the adapter's benchmark: seconds, memory, tokens a second, share of the matrix rate."""
    columns = ["tokens_per_second", "share_of_matrix_rate", "step_mib", "peak_mib"]
    rows = [
        {"benchmark": name, "part": part, "way": way, "rows": found["rows"], "seconds": value["seconds"]["median"]}
        | {"to": reference(found), "ratio": value["time_ratio"]["median"]}
        | {column: value.get(column) for column in columns}
        for name, part, found in parts(results)
        for way, value in found.items()
        if isinstance(value, dict) and "tokens_per_second" in value
    ]
    columns = [*PLACE, "way", "rows", "seconds", "to", "ratio", *columns]
    return pd.DataFrame(rows, columns=columns).set_index([*PLACE, "way"])
