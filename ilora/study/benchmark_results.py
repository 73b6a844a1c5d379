"""Results of the benchmarks as tables: ratios of times, and whether they meet their goals.

The `metrics` of a result are parts. A part times several ways of doing one thing; its ratios are relative to the way
`to`. A goal is {"at_least": number} or {"at_most": number}.
"""

import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ilora.errors import UserError
from ilora.study.results import load_results

Results = Mapping[str, Mapping[str, Any]]  # name of the file, such as "language_cpu" -> its content
RATIO = ["to", "rows", "seconds", "seconds_to", "value", "low", "high", "goal", "aim", "met"]
STEP = ["tokens_per_second", "share_of_matrix_rate", "step_mib", "peak_mib"]  # of training steps of the adapter


def load_benchmarks(folder: str | Path) -> dict[str, dict]:
    """The result of each benchmark. Raises UserError if the folder has none."""
    results = load_results(folder)
    if not results:
        raise UserError(f"{folder} contains no results of benchmarks: run make bench")
    return results


def parts(results: Results, failed: bool = False) -> Iterator[tuple[str, str, dict]]:
    """(benchmark, name of the part, its content) of every part that succeeded, or of every one that failed."""
    for benchmark, result in results.items():
        yield from ((benchmark, *part) for part in result["metrics"].items() if ("error" in part[1]) == failed)


def _table(rows: dict[tuple[str, str, str], dict], name: str, columns: list[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=["benchmark", "part", name]) if rows else None
    return pd.DataFrame(list(rows.values()), index, columns)


def judge(value: float, goals: Mapping[str, float]) -> dict[str, Any]:
    """The goal in words, as the number `aim`, and whether the value has met it; "", nan and None without a goal."""
    for kind, meets in (("at_least", operator.ge), ("at_most", operator.le)):
        if kind in goals:
            goal = f"{kind.replace('_', ' ')} {goals[kind]:g}"
            return {"goal": goal, "aim": goals[kind], "met": bool(meets(value, goals[kind]))}
    return {"goal": "", "aim": np.nan, "met": None}


def ratios(results: Results) -> pd.DataFrame:
    """Median and quartiles of each way's time divided by that of the way `to`, median seconds of both, and the goal."""
    rows = {}
    for *place, content in parts(results):
        for name, entry in content.items():
            if isinstance(entry, dict) and "time_ratio" in entry:
                ratio, reference = entry["time_ratio"], content[content["to"]]
                seconds = {"seconds": entry["seconds"]["median"], "seconds_to": reference["seconds"]["median"]}
                value = {"value": ratio["median"], "low": ratio["low"], "high": ratio["high"]}
                rows[*place, name] = content | entry | seconds | value | judge(ratio["median"], entry)
    return _table(rows, "way", RATIO + STEP)
