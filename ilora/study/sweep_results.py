"""Results of sweeps: one table of runs, means over seeds, and differences from the default run of the same seed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ilora.errors import UserError
from ilora.study.comparisons import format_interval
from ilora.study.notebooks import plan
from ilora.study.parameters import PARAMETERS
from ilora.study.results import load_results

ADAPTER = ("rank", "alpha", "dropout", "experts", "gate", "guidance", "gate_per_layer", "gate_top_k")
NEVER_COMPARED = ("seed", "data_dir", "device", "results", "encoder_epochs")  # the last is only a limit
SETTING = tuple(name for name in PARAMETERS if name not in (*ADAPTER, *NEVER_COMPARED))  # data, training, base model
NO_GATE = "LoRA, no gate"


def load_runs(folder: str | Path, notebook: str) -> pd.DataFrame:
    """A row per result of a notebook: parameters (or today's defaults), `<system>.<metric>`, device and commit.

    `changed`: parameters that differ from the default; `setting`: data set and changes in SETTING, as text. Runs of
    one expert are left out: every run has LoRA. Raises UserError if a setting's results are on different data.
    """
    (job,) = plan({}, [notebook])
    results = load_results(folder, f"{job.source.stem}-*.json").values()
    rows = [row for row in (_row(result, job.parameters) for result in results) if row["experts"] > 1]
    table = pd.DataFrame(rows, columns=None if rows else [*job.parameters, "commit", "changed", "setting", "data"])
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
    row = parameters | values | {"device": result["device"]["name"], "commit": result["commit"], "data": content}
    return row | {"changed": tuple(changed), "setting": ", ".join([parameters["dataset"], *setting])}


def default_runs(runs: pd.DataFrame, *free: str) -> pd.DataFrame:
    """Runs in which all parameters have their defaults, except the `free` ones, seed and device."""
    return runs[runs["changed"].map({*free}.issuperset).astype(bool)]


def repeated(runs: pd.DataFrame, name: str, within: str) -> pd.DataFrame:
    """Runs, restricted to values of `within` that were repeated with several values of `name`."""
    runs = runs if name in runs else runs.iloc[:0].assign(**{name: np.nan})
    return runs[runs.groupby(within)[name].transform("nunique") > 1]


def with_lora(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs and, once per seed and setting, LoRA as a run with one expert: its metrics in iLoRA's columns."""
    lora = {name: runs[name.replace("iLoRA", "LoRA")] for name in runs if "iLoRA" in name}
    one_expert = runs.assign(experts=1, **lora).drop_duplicates(["setting", "seed"])
    return pd.concat([one_expert, runs], ignore_index=True)


def validation_by_epoch(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation HitRatio@1 after each epoch, of runs that recorded it: setting, seed, experts, epoch, hit_ratio."""
    table = runs.reindex(columns=["setting", "seed", "experts", "training.validation.iLoRA"])
    table = table.set_axis(["setting", "seed", "experts", "hit_ratio"], axis=1).dropna()
    table["epoch"] = [[*range(1, 1 + len(values))] for values in table["hit_ratio"]]
    return table.explode(["epoch", "hit_ratio"], ignore_index=True).astype({"epoch": int, "hit_ratio": float})


def student_interval(values: Iterable[float]) -> dict:
    """Mean of one value per seed with Student's 95 % interval (NaN for one seed), n, and the values as `runs`."""
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


def mean_slope(runs: pd.DataFrame, x: str, column: str, per_doubling: bool = False) -> dict:
    """`student_interval` of the slope of `column` over `x`: a straight line for each seed with two values of `x`."""
    known = runs.reindex(columns=["seed", x, column]).dropna().astype(float)
    seeds = known.assign(x=np.log2(known[x]) if per_doubling else known[x]).groupby("seed")
    return student_interval(stats.linregress(of["x"], of[column]).slope for _, of in seeds if of["x"].nunique() > 1)


def conclusion(what: str, interval: Mapping, over: str = "") -> str:
    """A sentence: whether `what` is significantly above or below zero or, for a slope over `over`, grows or falls."""
    if interval["n"] < 2:
        return f"{what}: {interval['n']} seeds with a result, too few for an interval"
    above, below, neither = "is above zero", "is below zero", "is not significantly different from zero"
    if over:
        above, below, neither = (f"{verb} with {over}" for verb in ("grows", "falls", "does not change significantly"))
    verb = above if interval["low"] > 0 else below if interval["high"] < 0 else neither
    return f"{what} {verb}: {format_interval(interval)}, n = {interval['n']} seeds"


def differences_from_default(runs: pd.DataFrame, name: str, *others: str) -> pd.DataFrame:
    """HitRatio@1 of the runs that change `name`, minus that of the default run of the same seed and setting.

    They may also change `others`. LoRA is one more variant in each setting. p is that of Student's paired test.
    """
    default, changed = default_runs(runs, *SETTING), default_runs(runs, *SETTING, name, *others)
    changed = changed[changed["changed"].map(lambda names: name in names).astype(bool)]
    variant = [
        ", ".join(f"{name} {run[name]}".removesuffix(".0") for name in (name, *others) if name in run["changed"])
        for run in changed.to_dict("records")
    ]
    lora = default[default["setting"].isin(changed["setting"])]
    lora = lora.assign(variant=NO_GATE, hit_ratio=lora.get("LoRA.hit_ratio"))
    changed = changed.assign(variant=variant, hit_ratio=changed.get("iLoRA.hit_ratio"))
    default = default.assign(default=default.get("iLoRA.hit_ratio"))[["setting", "seed", "default"]]
    compared = pd.concat([lora, changed])[["setting", "seed", "variant", "hit_ratio"]]
    compared = compared.merge(default, on=["setting", "seed"])
    compared["difference"] = compared["hit_ratio"] - compared["default"]
    table = means_over_seeds(compared, ["setting", "variant"], {"": "difference"}).drop(columns="system")
    p = [stats.ttest_1samp(values, 0).pvalue if len(values) > 1 else np.nan for values in table["runs"]]
    return table.assign(p=p)


def count_without_zero(differences: pd.DataFrame) -> str:
    """How many intervals of variants exclude zero, uncorrected, and which: a figure's title."""
    known = differences[(differences["n"] > 1) & (differences["variant"] != NO_GATE)]
    outside = known[(known["low"] > 0) | (known["high"] < 0)]
    which = [f"{row.variant} ({row.setting})" for row in outside.head(2).itertuples()]
    which = f": {'; '.join(which)}{', ...' if len(outside) > 2 else ''}" if which else ""
    return f"before any correction {len(outside)} of {len(known)} intervals exclude zero{which}"


def with_adjusted_p(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Tables of `differences_from_default` as one, with p adjusted by Benjamini and Hochberg's method."""
    table = pd.concat(tables).drop_duplicates(["setting", "variant"], ignore_index=True)
    p = table["p"].dropna().astype(float)
    return table.assign(**{"p, adjusted": pd.Series(stats.false_discovery_control(p), p.index, float)})
