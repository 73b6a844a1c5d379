"""Results of the table of systems: means with intervals, paired comparisons, and what they allow us to conclude."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ilora import data, evaluation
from ilora.errors import UserError
from ilora.study.comparisons import crossed_interval, format_interval, holm, paired_comparison
from ilora.study.results import load_results
from ilora.study.systems import ROUNDING_ONLY, SYSTEMS

COMPARISON = [
    "n", "value", "low", "high", "p", "p_holm", "bootstrap_low", "bootstrap_high", "mcnemar_median", "mcnemar_least",
    "mcnemar_largest",
]  # fmt: skip
ORDER = {name: place for place, name in enumerate((*data.WORDS, *SYSTEMS))}  # of rows: data sets, systems


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
    """system -> its outcomes on a data set, in the table's order.

    Raises UserError if runs of one system share a seed, or differ in their questions or in another setting.
    """
    systems = {system: runs for (name, system), runs in _cells(results).items() if name == dataset}
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
    hit, valid = (
        np.array([[list(row) for row in run["outcomes"][f"{windows} {key}"]] for run in runs]) == "1"
        for key in ("hit", "valid")
    )
    questions, windows_per_user, sample = sets[0]
    users = np.repeat(np.arange(len(windows_per_user)), windows_per_user)
    rows = np.arange(len(users)) if sample is None else np.array(sample)
    return Outcomes(tuple(parameters["seed"]), hit, valid, users[rows], tuple(questions), rows)


def system_means(outcomes: Mapping[str, Outcomes]) -> pd.DataFrame:
    """A row per system: `crossed_interval` of HitRatio@1 within [0, 1], valid_ratio, hit_ratio_of_valid.

    Outcomes without any variance get the interval of `evaluation.interval`.
    """
    rows = {}
    for system, of in outcomes.items():
        row = crossed_interval(of.hit, of.users)
        if row["low"] == row["high"]:
            row |= {end: evaluation.interval(of.hit.mean((0, 1)), of.users)[end] for end in ("low", "high")}
        row |= {"low": max(row["low"], 0.0), "high": min(row["high"], 1.0), "valid_ratio": of.valid.mean()}
        rows[system] = row | {"hit_ratio_of_valid": of.hit.sum() / max(of.valid.sum(), 1)}
    return pd.DataFrame.from_dict(rows, orient="index")


def compare_systems(outcomes: Mapping[str, Outcomes], system: str = "iLoRA") -> pd.DataFrame:
    """`paired_comparison` of one system with each other one on their common questions, with Holm's p over the rows."""
    return _compare({other: (outcomes[system], outcomes[other], system) for other in outcomes if other != system})


def compare_bases(large: Mapping[str, Outcomes], small: Mapping[str, Outcomes]) -> pd.DataFrame:
    """`paired_comparison` of each system over a large base with itself over a small one, as in `compare_systems`."""
    return _compare({system: (large[system], small[system], system) for system in large if system in small})


def _compare(pairs: Mapping[str, tuple[Outcomes, Outcomes, str]]) -> pd.DataFrame:
    """name -> (first, second, first's system); pairs without a common question or a common seed are left out."""
    rows = {}
    for name, (first, second, system) in pairs.items():
        several = len(first.seeds) > 1 < len(second.seeds) or (SYSTEMS[system].seeds and SYSTEMS[name].seeds)
        _, *seeds = np.intersect1d(first.seeds, second.seeds, return_indices=True)
        _, *places = np.intersect1d(first.rows, second.rows, return_indices=True)
        if first.questions != second.questions or not len(places[0]) or (several and not len(seeds[0])):
            continue
        hits = [of.hit[seed] if several else of.hit for of, seed in zip((first, second), seeds, strict=True)]
        hits = [hit[..., place] for hit, place in zip(hits, places, strict=True)]
        rows[name] = paired_comparison(*hits, second.users[places[1]])
    if not rows:
        return pd.DataFrame(columns=COMPARISON, dtype=float)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_holm=holm(table["p"]))


def conclusions(comparisons: Mapping[str, pd.DataFrame], system: str = "iLoRA", level: float = 0.05) -> pd.Series:
    """Which systems `system` is above, below, or not significantly different from, on each data set, as text.

    Significant: Holm's p (for other users) is below `level`, and the interval (also for other runs) excludes zero.
    """
    texts = {}
    for dataset, table in comparisons.items():
        significant = (table["p_holm"] < level) & ((table["low"] > 0) | (table["high"] < 0))
        above, below = significant & (table["value"] > 0), significant & (table["value"] < 0)
        groups = {"above": above, "below": below, "not significantly different from": ~significant}
        named = [f"{words} {', '.join(table.index[rows])}" for words, rows in groups.items() if rows.any()]
        texts[dataset] = "; ".join(named) or "no other system answered the same questions"
    return pd.Series(texts, name=system, dtype=object)


def stack(tables: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """These columns of the tables of several data sets as one table; empty without tables."""
    return pd.concat({name: table[columns] for name, table in tables.items()} or {"": pd.DataFrame(columns=columns)})


def formatted(means: Mapping[str, pd.DataFrame], printed: pd.Series | None = None) -> pd.DataFrame:
    """`system_means` of several data sets as text, with the paper's printed ratios if given."""
    if not means:
        return pd.DataFrame()
    table = pd.concat(means)
    text = pd.DataFrame({"HitRatio@1": [_unbroken(row) for row in table.to_dict("records")]}, table.index)
    ratios = {name: table[name].map("{:.3f}".format) for name in ("valid_ratio", "hit_ratio_of_valid")}
    text = text.assign(**ratios, **table[["n", "seeds", "draws"]].astype(int))
    if printed is not None:
        paper = printed.rename({"Llama2": "Language model"}).reindex(table.index)
        text["paper"] = ["-" if np.isnan(ratio) else f"{ratio:.4f}" for ratio in paper]
    return text


def _unbroken(interval: Mapping) -> str:
    return format_interval(interval).replace(" ", "\N{NO-BREAK SPACE}")  # so that a page keeps it on one line


def runs_by_system(results: Sequence[Mapping]) -> pd.DataFrame:
    """For each data set and system: seeds, draws, settings, devices, commits, and median seconds of a run."""
    columns = ["dataset", "system", "seeds", "draws", "settings", "device", "commit", "seconds"]
    rows = []
    for (dataset, system), runs in _cells(results).items():
        parameters, seconds = runs[0]["parameters"], round(float(np.median([run["seconds"] for run in runs])))
        settings = [f"{name} {parameters[name]}" for name in SYSTEMS[system].uses if name in parameters]
        devices, commits = {run["device"]["name"] for run in runs}, {run["commit"][:7] for run in runs}
        texts = (", ".join(values) for values in (settings, sorted(devices), sorted(commits)))
        rows.append((dataset, system, len(runs), parameters["draws"], *texts, seconds))
    return pd.DataFrame(rows, columns=columns).set_index(["dataset", "system"])


def regularisation_searches(folder: str | Path) -> pd.DataFrame:
    """How validation chose dropout and L2, a row per recommender: chosen; at_edge: whether one of them is the grid's
    largest value; n; HitRatio@1 on validation with its interval for each trial of the grid. Results of 0.1 chose L2."""
    rows = []
    for search in (load_results(folder, "l2-*.json") | load_results(folder, "regularisation-*.json")).values():
        chosen, grid = search["metrics"]["chosen"], search["metrics"]["grid"]
        chosen = chosen if isinstance(chosen, Mapping) else {"l2": chosen}
        row = {name: search["parameters"][name] for name in ("dataset", "system")}
        at_edge = any(chosen[name] == max(trial[name] for trial in grid) > 0 for name in chosen)
        row |= {"chosen": _trial(chosen, chosen), "at_edge": at_edge, "n": grid[0]["n"]}
        rows.append(row | {_trial(trial, chosen): _unbroken(trial) for trial in grid})
    table = pd.DataFrame(rows, columns=None if rows else ["dataset", "system", "chosen", "at_edge", "n"])
    return table.sort_values(["dataset", "system"], key=lambda names: names.map(ORDER), ignore_index=True)


def _trial(values: Mapping[str, float], names: Iterable[str]) -> str:
    """The settings of one trial in words: "dropout 0.2, L2 1e-05"."""
    return ", ".join(f"{name.replace('l2', 'L2')} {values[name]:g}" for name in names)


def failed_runs(results: Sequence[Mapping]) -> pd.DataFrame:
    """The runs that failed, with their reasons."""
    rows = [{**result["parameters"], "reason": result["error"]} for result in results if "error" in result]
    return pd.DataFrame(rows, columns=["system", "dataset", "seed", "reason"])
