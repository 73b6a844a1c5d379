"""The table read: what systems answered in all their runs, how sure their means are, and which of them differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ilora import data, evaluation, runs, uncertainty
from ilora.table import FREE, SYSTEMS

COMPARED = [
    "n", "value", "low", "high", "p", "p_holm", "bootstrap_low", "bootstrap_high", "mcnemar_median", "mcnemar_least",
    "mcnemar_largest",
]  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What a system answered to one set of questions, or to a sample of it, in all its runs."""

    seeds: tuple[int, ...]
    hit: np.ndarray  # (seeds, draws, n) bool
    valid: np.ndarray  # (seeds, draws, n) bool
    users: np.ndarray  # (n,)
    questions: tuple[str, ...]  # a digest of each draw's questions, of all of the set
    rows: np.ndarray  # (n,) which questions of the set were asked, in order


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The results and failures of a folder.  Raises UserError if there are none."""
    paths = sorted(Path(folder).glob("table-*.json"))
    if not paths:
        raise runs.UserError(f"{folder} holds no results: make them with python -m ilora table --to {folder}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def answers(results: Sequence[Mapping], dataset: str, windows: str = "last") -> dict[str, Answers]:
    """system -> its answers on a data set, runs in the order of their seeds; systems in the table's order.

    Raises UserError for runs of one system that differ in a setting besides the seed, or in what they were asked.
    """
    found = {}
    for system in SYSTEMS:
        own = [r for r in results if _of(r) == (dataset, system) and "error" not in r]
        own.sort(key=lambda result: result["parameters"]["seed"])
        if not own:
            continue
        settings = [{k: v for k, v in r["parameters"].items() if k not in ("seed", *FREE)} for r in own]
        if any(other != settings[0] for other in settings):
            raise runs.UserError(f"the results of {system} on {dataset} are of several settings: keep one in a folder")
        asked = [[r["outcomes"].get(f"{windows} {what}") for what in ("questions", "windows", "rows")] for r in own]
        if dataset != "world" and any(other != asked[0] for other in asked):  # each seed draws its own world
            raise runs.UserError(f"the runs of {system} on {dataset} were asked different questions: make them again")
        hit, valid = (
            np.array([[_bits(row) for row in r["outcomes"][f"{windows} {name}"]] for r in own])
            for name in ("hit", "valid")
        )
        questions, of_users, sample = asked[0]
        users = np.repeat(np.arange(len(of_users)), of_users)  # of all questions
        rows = np.arange(len(users)) if sample is None else np.array(sample)
        seeds = tuple(r["parameters"]["seed"] for r in own)
        found[system] = Answers(seeds, hit, valid, users[rows], tuple(questions), rows)
    return found


def _of(result: Mapping) -> tuple[str, str]:
    return result["parameters"]["dataset"], result["parameters"]["system"]


def _bits(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def summary(found: Mapping[str, Answers]) -> pd.DataFrame:
    """One row a system: hit_ratio (right of all) as `uncertainty.spread` gives it, valid_ratio, hit_ratio_of_valid.

    Where all answers are alike, which have no spread, the interval is that of `evaluation.interval`.
    """
    rows = {}
    for system, own in found.items():
        row = uncertainty.spread(own.hit, own.users)
        if row["low"] == row["high"]:
            alike = evaluation.interval(own.hit.mean((0, 1)), own.users)
            row |= {"low": alike["low"], "high": alike["high"]}
        row |= {"low": max(row["low"], 0.0), "high": min(row["high"], 1.0)}
        of_valid = own.hit.sum() / max(own.valid.sum(), 1)
        rows[system] = row | {"valid_ratio": own.valid.mean(), "hit_ratio_of_valid": of_valid}
    return pd.DataFrame.from_dict(rows, orient="index")


def comparisons(found: Mapping[str, Answers], system: str = "iLoRA") -> pd.DataFrame:
    """`uncertainty.compare` of one system with each that was asked the same, and Holm's p over these comparisons.

    Trained systems are compared in the seeds that both have, and one that was asked a sample on its rows alone.
    """
    trained = SYSTEMS[system].seeds
    pairs = {
        other: _compared(found[system], own, trained and SYSTEMS[other].seeds)
        for other, own in found.items()
        if other != system
    }
    return _corrected(pairs)


def gained(large: Mapping[str, Answers], small: Mapping[str, Answers]) -> pd.DataFrame:
    """`uncertainty.compare` of each system over a large base with itself over a small one, as in `comparisons`."""
    both = [system for system in large if system in small]
    return _corrected({system: _compared(large[system], small[system], SYSTEMS[system].seeds) for system in both})


def _compared(ours: Answers, own: Answers, trained: bool) -> dict | None:
    """None where they have no question or, if both are trained, no seed in common."""
    shared = sorted({*ours.seeds} & {*own.seeds}) if trained else None
    _, *places = np.intersect1d(ours.rows, own.rows, assume_unique=True, return_indices=True)
    if own.questions != ours.questions or shared == [] or not len(places[0]):
        return None
    pair = (_of_seeds(one, shared)[..., at] for one, at in zip((ours, own), places, strict=True))
    return uncertainty.compare(*pair, own.users[places[1]])


def _corrected(pairs: Mapping[str, dict | None]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict({name: row for name, row in pairs.items() if row}, orient="index")
    if table.empty:
        return pd.DataFrame(columns=COMPARED, dtype=float)
    return table.assign(p_holm=uncertainty.holm(table["p"]))


def _of_seeds(own: Answers, seeds: Sequence[int] | None) -> np.ndarray:
    """Right answers of these seeds, of all without them."""
    return own.hit if seeds is None else own.hit[[own.seeds.index(seed) for seed in seeds]]


def stacked(tables: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """These columns of the tables of several data sets as one table; an empty one of no table."""
    return pd.concat({name: own[columns] for name, own in tables.items()} or {"": pd.DataFrame(columns=columns)})


def missing(summaries: Mapping[str, pd.DataFrame], datasets: Sequence[str]) -> str:
    """One sentence: of which systems these data sets have no results."""
    parts = []
    for name in datasets:
        gone = [system for system in SYSTEMS if name not in summaries or system not in summaries[name].index]
        if gone:
            parts.append(f"{name} ({'any system' if len(gone) == len(SYSTEMS) else ', '.join(gone)})")
    said = f"no results of {'; '.join(parts)}" if parts else f"results of every system on {', '.join(datasets)}"
    return f"There are {said}."


def datasets(results: Sequence[Mapping]) -> list[str]:
    """The data sets of which there are answers."""
    found = dict.fromkeys(_of(result)[0] for result in results if "error" not in result)
    return [name for name in data.WORDS if name in found]


def provenance(results: Sequence[Mapping]) -> pd.DataFrame:
    """What was run: for each data set and system the seeds, draws, settings, device, commits and seconds a run."""
    rows = []
    for name, system in ((name, system) for name in datasets(results) for system in SYSTEMS):
        own = [r for r in results if _of(r) == (name, system) and "error" not in r]
        if own:
            uses = [use for use in SYSTEMS[system].uses if use in own[0]["parameters"]]
            rows.append({
                "dataset": name, "system": system, "seeds": len(own), "draws": own[0]["parameters"]["draws"],
                "settings": ", ".join(f"{use} {own[0]['parameters'][use]}" for use in uses),
                "device": ", ".join(sorted({r["device"]["name"] for r in own})),
                "commit": ", ".join(sorted({r["commit"][:7] for r in own})),
                "seconds": round(float(np.median([r["seconds"] for r in own]))),
            })  # fmt: skip
    columns = ["dataset", "system", "seeds", "draws", "settings", "device", "commit", "seconds"]
    return pd.DataFrame(rows, columns=columns).set_index(["dataset", "system"])


def readable(summaries: Mapping[str, pd.DataFrame], printed: pd.Series | None = None) -> pd.DataFrame:
    """Summaries of several data sets as one table for a reader, with what the paper prints beside it, if given."""
    names = {"Language model": "Llama2"}  # what the paper calls it
    rows = {}
    for (dataset, own), system in ((pair, system) for pair in summaries.items() for system in pair[1].index):
        row = own.loc[system]
        whole = evaluation.written(row).replace(" ", "\N{NO-BREAK SPACE}")  # else a page breaks it into three lines
        rows[dataset, system] = {"HitRatio@1": whole, "valid_ratio": f"{row['valid_ratio']:.3f}"}
        rows[dataset, system] |= {"hit_ratio_of_valid": f"{row['hit_ratio_of_valid']:.3f}", "n": int(row["n"])}
        rows[dataset, system] |= {"seeds": int(row["seeds"]), "draws": int(row["draws"])}
        if printed is not None:
            known = printed.get((dataset, names.get(system, system)))
            rows[dataset, system]["paper"] = "-" if known is None else f"{known:.4f}"
    return pd.DataFrame.from_dict(rows, orient="index")


def verdicts(against: Mapping[str, pd.DataFrame], system: str = "iLoRA", level: float = 0.05) -> pd.Series:
    """What the comparisons on each data set say, in words.

    A difference needs both: other users would show it (Holm's p, which takes runs and draws as they are), and so would
    other runs (an interval without zero).
    """
    found = {}
    for dataset, table in against.items():
        sure = table[(table["p_holm"] < level) & ((table["low"] > 0) | (table["high"] < 0))]
        above, below = (list(sure.index[sure["value"] * sign > 0]) for sign in (1, -1))
        open_ = [name for name in table.index if name not in sure.index]
        parts = [("above", above), ("below", below), ("not told apart from", open_)]
        said = "; ".join(f"{word} {', '.join(names)}" for word, names in parts if names)
        found[dataset] = said or "no other system was asked the same"
    return pd.Series(found, name=system, dtype=object)


def searches(folder: str | Path) -> pd.DataFrame:
    """How validation chose dropout and L2, of the searches in a folder: a row a recommender, empty if there are none.

    chosen; at_edge: whether a chosen value is the largest of the grid, so that a larger one might have won; n; for
    each pair of the grid HitRatio@1 on validation, written with its interval.
    """

    def written(values: Mapping[str, float]) -> str:
        return f"dropout {values['dropout']:g}, L2 {values['l2']:g}"

    rows = []
    for path in sorted(Path(folder).glob("regularisation-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        about, chosen, grid = result["parameters"], result["metrics"]["chosen"], result["metrics"]["grid"]
        at_edge = any(chosen[name] == max(values[name] for values in grid) > 0 for name in chosen)
        row = {"dataset": about["dataset"], "system": about["system"], "chosen": written(chosen), "at_edge": at_edge}
        scores = {written(values): evaluation.written(values).replace(" ", "\N{NO-BREAK SPACE}") for values in grid}
        rows.append(row | {"n": grid[0]["n"]} | scores)
    order = {name: place for place, name in enumerate((*data.WORDS, *SYSTEMS))}
    rows.sort(key=lambda row: (order[row["dataset"]], order[row["system"]]))
    return pd.DataFrame(rows, columns=None if rows else ["dataset", "system", "chosen", "at_edge", "n"])


def plain(value: Any) -> Any:
    """A nested report in which missing numbers are None, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def failures(results: Sequence[Mapping]) -> pd.DataFrame:
    """The cells that failed, with the reason of each."""
    rows = [{**result["parameters"], "reason": result["error"]} for result in results if "error" in result]
    return pd.DataFrame(rows, columns=["system", "dataset", "seed", "reason"])
