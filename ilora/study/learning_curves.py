"""HitRatio@1 on validation after each epoch: how a learning rate was chosen, and what more training promises."""

from pathlib import Path

import pandas as pd

from ilora.study import paper
from ilora.study.table_results import load_table


def validation_curves(folder: str | Path, seed: int = 0) -> pd.DataFrame:
    """The curves of the results in a folder and in its subfolders of other learning rates, for one seed.

    Returns a row per dataset, system, learning_rate (NaN for recommenders) and epoch, with hit_ratio.
    """
    columns, rows = ["dataset", "system", "learning_rate", "epoch", "hit_ratio"], []
    for path in [Path(folder), *sorted(Path(folder).glob("rate_*"))]:
        for run in load_table(path):
            cell = [run["parameters"].get(name) for name in columns[:3]]
            if "error" not in run and run["parameters"]["seed"] == seed:
                rows += [(*cell, *point) for point in enumerate(run["metrics"].get("validation", ()), 1)]
    curves = pd.DataFrame(rows, columns=columns).replace({"dataset": paper.PRINTED_NAMES})
    return curves.sort_values(columns[:4], ignore_index=True)


def best_rates(curves: pd.DataFrame) -> pd.DataFrame:
    """Best validation HitRatio@1 for each data set and rate, a column per adapter; the best `mean` chooses the rate."""
    best = curves.groupby(["dataset", "learning_rate", "system"])["hit_ratio"].max().unstack()
    complete = best[[system for system in ("LLaRA", "iLoRA") if system in best]].dropna()
    return complete.assign(mean=complete.mean(axis=1))
