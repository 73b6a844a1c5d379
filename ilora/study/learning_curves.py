"""HitRatio@1 on validation after each epoch: how a learning rate was chosen, and what more training promises."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from ilora.study import figures, paper
from ilora.study.table_results import load_table

STYLES = ("-", "--", ":", "-.")


def validation_curves(folder: str | Path, seed: int = 0) -> pd.DataFrame:
    """The curves of the results in a folder and in its subfolders of other learning rates, for one seed.

    Returns a row per dataset, system, learning_rate (NaN for recommenders) and epoch, with hit_ratio.
    """
    folders = [Path(folder), *sorted(Path(folder).glob("rate_*"))]
    results = [result for each in folders for result in load_table(each) if "error" not in result]
    rows = [row for result in results if result["parameters"]["seed"] == seed for row in _curve(result)]
    columns = ["dataset", "system", "learning_rate", "epoch", "hit_ratio"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4], ignore_index=True)


def _curve(result: Mapping) -> Iterable[tuple]:
    settings = result["parameters"]
    name = paper.PRINTED_NAMES.get(settings["dataset"], settings["dataset"])
    for epoch, hit_ratio in enumerate(result["metrics"].get("validation", ()), 1):
        yield name, settings["system"], settings.get("learning_rate"), epoch, hit_ratio


def best_rates(curves: pd.DataFrame) -> pd.DataFrame:
    """Best validation HitRatio@1 for each data set and rate, a column per adapter; the best `mean` chooses the rate."""
    tuned = curves.dropna(subset="learning_rate")
    best = tuned.groupby(["dataset", "learning_rate", "system"])["hit_ratio"].max().unstack()
    complete = best[[system for system in ("LLaRA", "iLoRA") if system in best]].dropna()
    return complete.assign(mean=complete.mean(axis=1))


def draw_curves(curves: pd.DataFrame, systems: Iterable[str] = ("SASRec", "LLaRA", "iLoRA")) -> np.ndarray:
    """A panel per data set, epochs on a logarithmic axis, a colour per system and a line style per learning rate."""
    datasets = list(dict.fromkeys(curves["dataset"]))
    rates = sorted(curves["learning_rate"].dropna().unique())
    figure, axes = plt.subplots(1, len(datasets), figsize=(1 + 3.4 * len(datasets), 3.4), squeeze=False, sharey=True)
    for ax, dataset in zip(axes[0], datasets, strict=True):
        for colour, system in zip(figures.COLOURS, systems, strict=False):
            of_system = curves[(curves["dataset"] == dataset) & (curves["system"] == system)]
            for rate, curve in of_system.groupby("learning_rate", dropna=False):
                style = "-" if np.isnan(rate) else STYLES[rates.index(rate) % len(STYLES)]
                label = system if np.isnan(rate) else f"{system}, rate {rate:g}"
                ax.plot(curve["epoch"], curve["hit_ratio"], style, marker=".", color=colour, label=label)
        ax.set(xscale="log", title=dataset, xlabel="epochs (log scale)", xticks=[1, 2, 5, 10, 25])
        ax.set_xticklabels(["1", "2", "5", "10", "25"])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("HitRatio@1 on validation")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    return axes[0]
