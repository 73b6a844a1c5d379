"""Results of sweeps compared: one table of runs, means over seeds, each variant beside the default of its seed.

Intervals are Student's over seeds: a seed draws its own world and its own training, and runs of one seed share both.
Where there are no results a table is empty, and figures say so.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ilora import runs
from ilora.__main__ import plan
from ilora.evaluation import written
from ilora.parameters import PARAMETERS

ADAPTER = ("rank", "alpha", "dropout", "experts", "gate", "guidance", "gate_per_layer", "gate_top_k")
ASIDE = ("seed", "data_dir", "device", "results")  # change what is compared by chance alone, or not at all
SETTING = tuple(name for name in PARAMETERS if name not in (*ADAPTER, *ASIDE))  # data, budget and base model
NO_GATE = "LoRA, no gate"
NOT_VALUES = ("low", "high", "n", "users")  # what stands beside the value of an interval


def read(folder: str | Path, notebook: str) -> pd.DataFrame:
    """One row a result of the notebook in `folder`: parameters, and `<system>.<metric>` for what it measured.

    A parameter that a result does not name had the value that is the notebook's default today. Beside them: the
    device's name, commit, `changed` (the names of parameters with another value than the default) and `setting`
    (the data set and what else of SETTING is changed, as text). Runs of one expert are left out: every run has LoRA.
    """
    (job,) = plan({}, [notebook])
    rows = []
    for path in sorted(Path(folder).glob(f"{job.source.stem}-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        own = job.parameters | result["parameters"]
        changed = tuple(name for name in own if name not in ASIDE and own[name] != job.parameters.get(name))
        other = [f"{name} {own[name]}" for name in changed if name in SETTING and name != "dataset"]
        flat = pd.json_normalize(result["metrics"]).iloc[0]
        measured = {
            name.removesuffix(".value"): flat[name] for name in flat.index if not _of_interval(name, flat.index)
        }
        about = {"changed": changed, "setting": ", ".join([own["dataset"], *other])}
        if own["experts"] > 1:
            rows.append(own | measured | {"device": result["device"]["name"], "commit": result["commit"]} | about)
    return pd.DataFrame(rows, columns=None if rows else [*job.parameters, "commit", "changed", "setting"])


def _of_interval(name: str, names: pd.Index) -> bool:
    of, _, what = name.rpartition(".")
    return what in NOT_VALUES and f"{of}.value" in names


def usual(table: pd.DataFrame, *free: str) -> pd.DataFrame:
    """The runs in which all parameters but the `free` ones have their defaults (seed and device are always free)."""
    return table[np.array([{*changed} <= {*free} for changed in table["changed"]], bool)]


def varied(table: pd.DataFrame, name: str, within: str) -> pd.DataFrame:
    """The runs of those values of `within` for which there are several values of `name`."""
    table = table if name in table else table.assign(**{name: np.nan})
    return table[table.groupby(within)[name].transform("nunique") > 1]


def with_lora(table: pd.DataFrame) -> pd.DataFrame:
    """The runs and, once for each seed and setting, LoRA as the run of one expert: its metrics in iLoRA's place."""
    columns = [name for name in table if "iLoRA" in name]
    of_lora = {name: table[name.replace("iLoRA", "LoRA")] for name in columns}
    one = table.assign(experts=1, **of_lora).drop_duplicates(["setting", "seed"])
    return pd.concat([one, table], ignore_index=True)


def per_epoch(table: pd.DataFrame) -> pd.DataFrame:
    """Validation HitRatio@1 after each epoch, of runs that say it: setting, seed, experts, epoch, hit_ratio."""
    long = table.reindex(columns=["setting", "seed", "experts", "training.validation.iLoRA"])
    long = long.set_axis(["setting", "seed", "experts", "hit_ratio"], axis=1).dropna()
    long["epoch"] = [[*range(1, 1 + len(values))] for values in long["hit_ratio"]]
    return long.explode(["epoch", "hit_ratio"], ignore_index=True).astype({"epoch": int, "hit_ratio": float})


def kept_gates(table: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """experts -> gate weights (histories, experts), rows named by user, of the runs that kept them, one a number."""
    kept = table.reindex(columns=["experts", "gate.users", "gate.weights"]).dropna()
    return {experts: pd.DataFrame(weights, index=users) for experts, users, weights in kept.itertuples(index=False)}


# ---------------------------------------------------------------- over seeds


def student(values: Sequence[float]) -> dict:
    """Mean of one value a seed with Student's 95 % interval (none for one seed), n, and the values themselves."""
    values, n = [float(value) for value in values], len(values)
    mean = float(np.mean(values)) if n else np.nan
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else np.nan
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n, "runs": values}


def over_seeds(table: pd.DataFrame, by: Sequence[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """`student` of the runs that share the values of `by`: system, *by, value, low, high, n, runs.

    columns: system -> column of `table`; runs that lack it are left out. Raises UserError for two runs of one seed.
    """
    rows = []
    for system, column in columns.items():
        for at, own in table.reindex(columns=[*by, "seed", column]).dropna().groupby([*by]):
            place = dict(zip(by, at, strict=True))
            if own["seed"].duplicated().any():
                raise runs.UserError(f"two results of one seed at {place}: remove one from the folder of results")
            rows.append({"system": system} | place | student(own.sort_values("seed")[column]))
    return pd.DataFrame(rows, columns=None if rows else ["system", *by, "value", "low", "high", "n", "runs"])


def less(table: pd.DataFrame, one: str, other: str) -> dict:
    """`student` of column `one` less column `other`, of runs that have both."""
    both = table.reindex(columns=["seed", one, other]).dropna().sort_values("seed")
    return student(both[one] - both[other])


def slope(table: pd.DataFrame, x: str, column: str, per_doubling: bool = False) -> dict:
    """`student` of a straight line's slope of `column` over `x`, one for each seed that has two values of `x`."""
    known = table.reindex(columns=["seed", x, column]).dropna().astype(float)
    at = np.log2(known[x]) if per_doubling else known[x]
    seeds = known.assign(at=at).groupby("seed")
    return student([stats.linregress(own["at"], own[column]).slope for _, own in seeds if own["at"].nunique() > 1])


def sentence(what: str, found: Mapping, over: str = "") -> str:
    """What an interval over seeds says: `what` is above zero, below it, or neither for certain; of a slope, with `over`
    for what it is over, that it grows or falls."""
    if found["n"] < 2:
        return f"{what}: {found['n']} seeds with a result, too few for an interval"
    above, below, neither = "is above zero", "is below zero", "cannot be told from zero"
    if over:
        above, below, neither = f"grows with {over}", f"falls with {over}", f"does not clearly change with {over}"
    chosen = above if found["low"] > 0 else below if found["high"] < 0 else neither
    return f"{what} {chosen}: {written(found)}, n = {found['n']} seeds"


# ---------------------------------------------------------------- variants


def paired(table: pd.DataFrame, name: str, *others: str) -> pd.DataFrame:
    """HitRatio@1 of the runs that change `name`, less that of the default run of the same seed and setting.

    They may change `others` with it, and no more. setting, variant, value, low, high, n, runs (see `student`) and p, of
    Student's paired test. LoRA, which has no gate, is a variant of each setting that has another.
    """
    columns = ["setting", "seed", "variant", "LoRA.hit_ratio", "iLoRA.hit_ratio"]
    default = usual(table, *SETTING).assign(variant=NO_GATE).reindex(columns=columns)
    changed = usual(table, *SETTING, name, *others)
    changed = changed[np.array([name in names for names in changed["changed"]], bool)]
    changed = changed.assign(variant=[_variant(run, (name, *others)) for run in changed.to_dict("records")])
    lora = default[default["setting"].isin(changed["setting"])]
    lora = lora.assign(**{"iLoRA.hit_ratio": lora["LoRA.hit_ratio"]})
    beside = pd.concat([lora, changed.reindex(columns=columns)])
    usually = default.drop(columns=["variant", "LoRA.hit_ratio"])
    beside = beside.merge(usually, on=["setting", "seed"], suffixes=("", ", default"))
    beside["difference"] = beside["iLoRA.hit_ratio"] - beside["iLoRA.hit_ratio, default"]
    found = over_seeds(beside, ["setting", "variant"], {"difference": "difference"}).drop(columns="system")
    found["p"] = [stats.ttest_1samp(values, 0).pvalue if len(values) > 1 else np.nan for values in found["runs"]]
    return found


def _variant(run: Mapping, names: Sequence[str]) -> str:
    own = {name: run[name] for name in names if name in run["changed"]}
    return ", ".join(f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in own.items())


def told_apart(found: pd.DataFrame) -> str:
    """Of which variants of `paired` the interval leaves out zero, one by one; titles a figure."""
    known = found[(found["n"] > 1) & (found["variant"] != NO_GATE)]
    apart = known[(known["low"] > 0) | (known["high"] < 0)]
    which = "; ".join(f"{row.variant} ({row.setting})" for row in apart.head(2).itertuples())
    said = f"before any correction {len(apart)} of {len(known)} intervals leave out zero"
    return said if apart.empty else f"{said}: {which}" + (", ..." if len(apart) > 2 else "")


def all_together(found: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The differences of several questions, each once, and p values adjusted for their number (Benjamini, Hochberg)."""
    table = pd.concat(found, ignore_index=True).drop_duplicates(["setting", "variant"], ignore_index=True)
    tested = table["p"].notna()
    table.loc[tested, "p, adjusted"] = stats.false_discovery_control(table.loc[tested, "p"].astype(float))
    return table


def records(table: pd.DataFrame) -> list[dict]:
    """The rows for a JSON, which has no NaN."""
    return json.loads(table.to_json(orient="records", double_precision=15))
