"""Results of the table of systems: means with intervals, paired comparisons, and what they allow us to conclude."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ilora import data, evaluation
from ilora.errors import UserError
from ilora.study.comparisons import crossed_interval, holm, paired_comparison
from ilora.study.results import load_results
from ilora.study.systems import ROUNDING_ONLY, SYSTEMS


class Outcomes(NamedTuple):
    """Outcomes of all runs of one system on a set of questions, or on a sample of the set."""

    seeds: tuple[int, ...]
    hit: np.ndarray  # (seeds, draws, n) bool
    valid: np.ndarray  # (seeds, draws, n) bool
    users: np.ndarray  # (n,)
    questions: tuple[str, ...]  # a digest of the whole set for each draw
    rows: np.ndarray  # (n,) places of these questions in the set, ascending


def load_table(folder: str | Path) -> list[dict[str, Any]]:
    """The results and failures of a folder. Raises UserError if there are none."""
    results = [*load_results(folder, "table-*.json").values()]
    if not results:
        raise UserError(f"{folder} contains no results: make them with python -m ilora table --to {folder}")
    return results


def _cells(results: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """(data set, system) -> its successful runs by seed, in the table's order."""
    cells = {(dataset, system): [] for dataset in data.WORDS for system in SYSTEMS}
    for run in sorted((run for run in results if "error" not in run), key=lambda run: run["parameters"]["seed"]):
        cells[run["parameters"]["dataset"], run["parameters"]["system"]].append(run)
    return {cell: runs for cell, runs in cells.items() if runs}


def datasets_in(results: Sequence[Mapping]) -> list[str]:
    """The data sets with at least one successful run."""
    return list(dict.fromkeys(dataset for dataset, _ in _cells(results)))


def outcomes_by_system(results: Sequence[Mapping], dataset: str, windows: str = "last") -> dict[str, Outcomes]:
    """system -> its outcomes. Raises UserError if runs share a seed, or differ in data, questions or settings."""
    systems = {system: runs for (name, system), runs in _cells(results).items() if name == dataset}
    contents = {(run["versions"]["ilora"], run["inputs"]["data"]) for runs in systems.values() for run in runs}
    if dataset != "world" and len(contents) > len(dict(contents)):  # each version has other keys
        raise UserError(f"the results on {dataset} are of different data: keep those on one data set in a folder")
    return {system: _outcomes(runs, f"{system} on {dataset}", windows) for system, runs in systems.items()}


def _outcomes(runs: Sequence[Mapping], what: str, windows: str) -> Outcomes:
    parameters = pd.DataFrame([run["parameters"] for run in runs])
    settings = parameters.drop(columns=["seed", *ROUNDING_ONLY], errors="ignore")
    differ = settings.columns[settings.nunique(dropna=False) > 1]
    if len(differ):
        raise UserError(f"the results of {what} differ in {', '.join(differ)}: keep one in a folder")
    if parameters["seed"].duplicated().any():
        raise UserError(f"there are two results of {what} with one seed: keep one in a folder")
    sets = [[run["outcomes"].get(f"{windows} {key}") for key in ("questions", "windows", "rows")] for run in runs]
    if runs[0]["parameters"]["dataset"] != "world" and any(other != sets[0] for other in sets):  # a world for each seed
        raise UserError(f"the runs of {what} answered different questions: run them again")
    strings = [[run["outcomes"][f"{windows} {key}"] for run in runs] for key in ("hit", "valid")]
    hit, valid = (np.array([[list(draw) for draw in run] for run in strings_of]) == "1" for strings_of in strings)
    questions, windows_per_user, sample = sets[0]
    users = np.repeat(np.arange(len(windows_per_user)), windows_per_user)
    rows = np.arange(len(users)) if sample is None else np.array(sample)
    return Outcomes(tuple(parameters["seed"]), hit, valid, users[rows], tuple(questions), rows)


def system_means(outcomes: Mapping[str, Outcomes]) -> pd.DataFrame:
    """A row per system: `crossed_interval` of HitRatio@1 within [0, 1], valid_ratio, hit_ratio_of_valid."""
    rows = {}
    for system, of in outcomes.items():
        row = crossed_interval(of.hit, of.users)
        if row["low"] == row["high"]:  # no variance
            row |= {end: evaluation.interval(of.hit.mean((0, 1)), of.users)[end] for end in ("low", "high")}
        row |= {"low": max(row["low"], 0.0), "high": min(row["high"], 1.0), "valid_ratio": of.valid.mean()}
        rows[system] = row | {"hit_ratio_of_valid": of.hit.sum() / max(of.valid.sum(), 1)}
    return pd.DataFrame.from_dict(rows, orient="index")


def compare_systems(outcomes: Mapping[str, Outcomes], system: str = "iLoRA") -> pd.DataFrame:
    """`paired_comparison` of one system with each that has common questions and seeds, with Holm's p over the rows."""
    first, rows = outcomes[system], {}
    for name, second in outcomes.items():
        several = len(first.seeds) > 1 < len(second.seeds)  # else the single run is paired with every other one
        _, *seeds = np.intersect1d(first.seeds, second.seeds, return_indices=True)
        _, *places = np.intersect1d(first.rows, second.rows, return_indices=True)
        no_seed = several and not len(seeds[0])
        if name == system or first.questions != second.questions or no_seed or not len(places[0]):
            continue
        hits = [of.hit[seed] if several else of.hit for of, seed in zip((first, second), seeds, strict=True)]
        hits = [hit[..., place] for hit, place in zip(hits, places, strict=True)]
        rows[name] = paired_comparison(*hits, second.users[places[1]])
    columns = None if rows else ["n", "value", "low", "high", "p", "p_holm"]
    table = pd.DataFrame(list(rows.values()), list(rows), columns, dtype=None if rows else float)
    return table.assign(p_holm=holm(table["p"]))


def verdict(comparisons: Mapping[str, pd.DataFrame], system: str, other: str, level: float = 0.05) -> str:
    """A sentence that says on which data sets `system` is above, below, or not significantly different from `other`."""
    groups = {"above": [], "below": [], "not significantly different from": []}
    for dataset, table in comparisons.items():
        if other in table.index:
            row, same = table.loc[other], [*groups][2]
            # Holm's p is about other users, the interval also about other runs
            significant = row["p_holm"] < level and (row["low"] > 0 or row["high"] < 0)
            groups[("above" if row["value"] > 0 else "below") if significant else same].append(dataset)
    parts = [f"{words} {other} on {listed(names)}" for words, names in groups.items() if names]
    return f"{system} is {listed(parts)}" if parts else f"{system} and {other} have no results on the same questions"


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence: "a, b and c"."""
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
