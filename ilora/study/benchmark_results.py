"""Results of the benchmarks as tables: ratios of times, measured values, and whether they meet their goals.

The `metrics` of a result are parts. A part times several ways of doing one thing; `to` names the way that its ratios
are relative to. A goal, {"at_least": number} or {"at_most": number}, is for a median ratio or for a measured value.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ilora.errors import UserError
from ilora.study.results import load_results

Results = Mapping[str, Mapping[str, Any]]  # name of the file, such as "language_cpu" -> its content


def load_benchmarks(folder: str | Path) -> dict[str, dict]:
    """The result of each benchmark. Raises UserError if the folder has none."""
    results = load_results(folder)
    if not results:
        raise UserError(f"{folder} contains no results of benchmarks: run make bench")
    return results


def machines(results: Results) -> pd.DataFrame:
    """Where each result was measured: device, threads, versions, commit, day, duration in minutes."""
    columns = ["device", "threads", "torch", "transformers", "peft", "commit", "day", "minutes"]
    rows = {}
    for name, result in results.items():
        commit = result["commit"][:10] + "+dirty" * result["commit"].endswith("+dirty")
        device, versions = result["device"], (result["versions"][package] for package in columns[2:5])
        minutes = round(result["seconds"] / 60, 1)
        rows[name] = (device["name"], device["threads"], *versions, commit, result["date"][:10], minutes)
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("benchmark")


def parts(results: Results, failed: bool = False) -> Iterator[tuple[str, str, dict]]:
    """(benchmark, name of the part, its content) of every part that succeeded, or of every one that failed."""
    for benchmark, result in results.items():
        yield from ((benchmark, *part) for part in result["metrics"].items() if ("error" in part[1]) == failed)


def _entries(results: Results, key: str) -> Iterator[tuple[tuple[str, str, str], dict, dict]]:
    """((benchmark, part, name), entry, content of the part) of every entry that has `key`."""
    for benchmark, part, content in parts(results):
        for name, entry in content.items():
            if isinstance(entry, dict) and key in entry:
                yield (benchmark, part, name), entry, content


def _table(rows: Iterable[tuple], index: str, columns: str) -> pd.DataFrame:
    index = ["benchmark", "part", *index.split()]
    return pd.DataFrame(rows, columns=[*index, *columns.split()]).set_index(index)


def failed_parts(results: Results) -> pd.DataFrame:
    """Parts that could not be measured, and why."""
    return _table(((*part, content["error"]) for *part, content in parts(results, failed=True)), "", "error")


def judge(value: float, goals: Mapping[str, float]) -> tuple[str, float, bool | None]:
    """The goal in words and as a number, and whether the value meets it; ("", nan, None) without a goal."""
    for kind, meets in (("at_least", operator.ge), ("at_most", operator.le)):
        if kind in goals:
            return f"{kind.replace('_', ' ')} {goals[kind]:g}", goals[kind], bool(meets(value, goals[kind]))
    return "", np.nan, None


def ratios(results: Results) -> pd.DataFrame:
    """Median and quartiles of each way's time divided by that of the way `to`, median seconds of both, and the goal."""
    rows = []
    for place, entry, content in _entries(results, "time_ratio"):
        if place[-1] != content["to"]:
            ratio, seconds = entry["time_ratio"], (way["seconds"]["median"] for way in (entry, content[content["to"]]))
            measured = (ratio["median"], ratio["low"], ratio["high"], *judge(ratio["median"], entry))
            rows.append((*place, content["to"], content.get("rows"), *seconds, *measured))
    return _table(rows, "way", "to rows seconds seconds_to value low high goal aim met")


def measured_values(results: Results) -> pd.DataFrame:
    """Values that are not ratios, with their 95 % intervals where there are any, and the goal."""
    entries = ((place, entry) for place, entry, _ in _entries(results, "value"))
    rows = [(*p, e["value"], e.get("low"), e.get("high"), *judge(e["value"], e)) for p, e in entries]
    return _table(rows, "what", "value low high goal aim met")


def equality_checks(results: Results) -> pd.DataFrame:
    """Whether the ways of a part gave the same results, or how large the largest difference is, as text."""
    checks = ((*place, check) for *place, part in parts(results) for check in part.get("agreement", {}).items())
    rows = [(*place, name, f"{x:.2g}" if isinstance(x, float) else str(x)) for *place, (name, x) in checks]
    return _table(rows, "what", "value")


def training_steps(results: Results) -> pd.DataFrame:
    """Training steps of the adapter: seconds, tokens a second, share of the rate of matrix products, memory in MiB."""
    measured = "tokens_per_second share_of_matrix_rate step_mib peak_mib"
    rows = []
    for place, entry, content in _entries(results, "tokens_per_second"):
        time = (entry["seconds"]["median"], content["to"], entry["time_ratio"]["median"])
        rows.append((*place, content["rows"], *time, *(entry.get(name) for name in measured.split())))
    return _table(rows, "way", f"rows seconds to ratio {measured}")
