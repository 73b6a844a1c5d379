"""Results of sweeps: one table of runs, means over seeds, and differences from the default system of the same seed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ilora.errors import UserError
from ilora.study.comparisons import format_interval
from ilora.study.notebooks import plan
from ilora.study.paper import PRINTED_NAMES
from ilora.study.parameters import PARAMETERS
from ilora.study.results import load_results
from ilora.study.table_results import ROUNDING_ONLY, compare_systems, datasets_in, outcomes_by_system

ADAPTER = ("rank", "alpha", "dropout", "experts", "gate", "guidance", "gate_per_layer", "gate_top_k")
NEVER_COMPARED = (*ROUNDING_ONLY, "seed", "data_dir", "results", "encoder_epochs")  # the last is only a limit
SETTING = tuple(name for name in PARAMETERS if name not in (*ADAPTER, *NEVER_COMPARED))  # data, training, base model
MORE = ("precision", "commit", "data", "changed", "setting")
LORA = "LoRA, no gate"
VARIANTS = {"experts": "K = {}", "gate_per_layer": "gate per layer", "gate_top_k": "top-{} gate", "alpha": "alpha {:g}"}
VARIANTS |= {"rank": "rank {}", "guidance": "{} guidance", "gate": "{} gate"}  # what a changed parameter is called


def load_runs(folder: str | Path, notebook: str) -> pd.DataFrame:
    """A row per result of a notebook: parameters (or today's defaults), `<system>.<metric>`, precision, commit.

    `changed`: parameters that differ from the default; `setting`: data set and changes in SETTING, as text. Runs of
    one expert are left out: every run has LoRA. Raises UserError if a setting's results are on different data.
    """
    (job,) = plan({}, [notebook])
    results = load_results(folder, f"{job.source.stem}-*.json").values()
    rows = [row for row in (_row(result, job.parameters) for result in results) if row["experts"] > 1]
    table = pd.DataFrame(rows, columns=None if rows else [*job.parameters, *MORE])
    for setting, count in table.groupby("setting")["data"].nunique().items():
        if count > 1:
            raise UserError(f"{folder} has results of {setting!r} on different data: keep those on one data set")
    return table


def _row(result: Mapping, default: Mapping) -> dict:
    parameters = default | result["parameters"]
    changed = [name for name in parameters if name not in NEVER_COMPARED and parameters[name] != default.get(name)]
    setting = [f"{name} {parameters[name]}" for name in changed if name in SETTING and name != "dataset"]
    flat = pd.json_normalize(result["metrics"]).iloc[0].to_dict()  # nested metrics as "a.b" -> value
    intervals = {name.removesuffix(".value") for name in flat if name.endswith(".value")}
    left_out = {f"{name}.{part}" for name in intervals for part in ("low", "high", "n", "users")}
    values = {name.removesuffix(".value"): value for name, value in flat.items() if name not in left_out}
    content = None if parameters["dataset"] == "world" else result.get("inputs", {}).get("data")  # older: none
    precision = "bfloat16" if result["device"]["type"] == "cuda" else "float32"
    row = parameters | values | {"precision": precision, "commit": result["commit"], "data": content}
    return row | {"changed": tuple(changed), "setting": ", ".join([parameters["dataset"], *setting])}


def default_runs(runs: pd.DataFrame, *free: str) -> pd.DataFrame:
    """Runs in which all parameters have their defaults, except the `free` ones, seed and device."""
    return runs[runs["changed"].map({*free}.issuperset).astype(bool)]


def student_interval(values: Iterable[float]) -> dict:
    """Mean of one value per seed with Student's 95% interval (NaN for one seed), n, and the values as `runs`."""
    n = len(values := [float(value) for value in values])
    mean = float(np.mean(values)) if n else np.nan
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else np.nan
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n, "runs": values}


def means_over_seeds(runs: pd.DataFrame, by: Sequence[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """`student_interval` for each system -> column and values of `by`. Raises UserError for two runs of one seed."""
    rows = []
    for system, column in columns.items():
        for values, group in runs.reindex(columns=[*by, "seed", column]).dropna().groupby([*by]):
            place = dict(zip(by, values, strict=True))
            if group["seed"].duplicated().any():
                raise UserError(f"two results have the same seed at {place}: remove one from the folder of results")
            rows.append({"system": system} | place | student_interval(group.sort_values("seed")[column]))
    return pd.DataFrame(rows, columns=None if rows else ["system", *by, "value", "low", "high", "n", "runs"])


def mean_slope(runs: pd.DataFrame, x: str, column: str) -> dict:
    """`student_interval` of the slope of `column` over `x`: a straight line for each seed with two values of `x`."""
    seeds = runs.reindex(columns=["seed", x, column]).dropna().astype(float).groupby("seed")
    return student_interval(stats.linregress(of[x], of[column]).slope for _, of in seeds if of[x].nunique() > 1)


def conclusion(what: str, interval: Mapping, over: str = "") -> str:
    """A sentence: whether `what` is significantly above or below zero or, for a slope over `over`, grows or falls."""
    if interval["n"] < 2:
        return f"{what}: too few seeds for an interval (n = {interval['n']})"
    above, below, neither = "is above zero", "is below zero", "is not significantly different from zero"
    if over:
        above, below, neither = (f"{verb} with {over}" for verb in ("grows", "falls", "does not change significantly"))
    verb = above if interval["low"] > 0 else below if interval["high"] < 0 else neither
    return f"{what} {verb}: {'slope ' if over else ''}{format_interval(interval)}, n = {interval['n']} seeds"


def differences_from_default(runs: pd.DataFrame, name: str, *others: str) -> pd.DataFrame:
    """HitRatio@1 of the runs that change `name`, minus that of the default run of the same seed, setting and precision.

    They may also change `others`. LoRA is one more variant in each setting. p is that of Student's paired test.
    """
    runs = default_runs(runs, *SETTING, name, *others)
    runs = runs.assign(hit_ratio=runs.get("iLoRA.hit_ratio", np.nan))
    default, same = default_runs(runs, *SETTING), ["setting", "seed", "precision"]
    changed = runs[runs["changed"].map(lambda names: name in names).astype(bool)]
    variant = [
        ", ".join(VARIANTS[each].format(run[each]) for each in (name, *others) if each in run["changed"])
        for run in changed.to_dict("records")
    ]
    lora = default.assign(variant=LORA, hit_ratio=default.get("LoRA.hit_ratio", np.nan))
    lora = lora.merge(changed[same].drop_duplicates())
    compared = pd.concat([lora, changed.assign(variant=variant)]).merge(default, on=same, suffixes=("", " of default"))
    compared["difference"] = compared["hit_ratio"] - compared["hit_ratio of default"]
    table = means_over_seeds(compared, ["setting", "variant"], {"": "difference"}).drop(columns="system")
    return table.assign(p=[stats.ttest_1samp(of, 0).pvalue if len(of) > 1 else np.nan for of in table["runs"]])


def differences_from_ilora(results: Sequence[Mapping], *variants: str) -> pd.DataFrame:
    """HitRatio@1 of variants of iLoRA ("K = 2") and of LoRA, minus iLoRA's, on data sets of the table with a variant.

    All have the same questions and several seeds, n. Intervals and p are over seeds and users.
    """
    columns, tables = ["setting", "variant", "value", "low", "high", "n", "p"], []
    names = {"LLaRA": LORA} | {f"iLoRA, {variant}": variant for variant in variants}
    for dataset in datasets_in(results):
        outcomes = outcomes_by_system(results, dataset, "all")
        kept = {name: of for name, of in outcomes.items() if name in ("iLoRA", *names) and len(of.seeds) > 1}
        if "iLoRA" in kept and kept.keys() - {"iLoRA", "LLaRA"}:
            table = compare_systems(kept).rename(names).rename_axis("variant").reset_index()
            signs = {"value": -table["value"], "low": -table["high"], "high": -table["low"], "p": table["p_student"]}
            tables.append(table.assign(setting=PRINTED_NAMES[dataset], n=table["seeds"].astype(int), **signs)[columns])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def count_without_zero(differences: pd.DataFrame) -> str:
    """How many intervals of variants exclude zero before a correction, as a figure's title."""
    known = differences[(differences["n"] > 1) & (differences["variant"] != LORA)]
    outside = int(((known["low"] > 0) | (known["high"] < 0)).sum())
    return f"before any correction, {outside} of {len(known)} intervals exclude{'s' * (outside == 1)} zero"
