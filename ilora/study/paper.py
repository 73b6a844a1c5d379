"""The paper's Table 1 (table_1.csv), and what follows from its printed numbers by arithmetic."""

from pathlib import Path

import pandas as pd

# Test sequences with three items or more in LLaRA's release, which the paper uses (Steam has 8 shorter ones).
SEQUENCES = {"LastFM": 122, "MovieLens": 95, "Steam": 1186}
LLARA_FIXED = {"LastFM": 0.5246, "MovieLens": 0.4526, "Steam": 0.5051}  # HitRatio@1 in the README of its later release
PRINTED_NAMES = {"lastfm": "LastFM", "movielens": "MovieLens", "steam": "Steam"}  # our data sets in the paper


def printed_results() -> pd.DataFrame:
    """Table 1 in long form: dataset, system, valid_ratio, hit_ratio, imp (Imp.%), n (test sequences)."""
    table = pd.read_csv(Path(__file__).with_name("table_1.csv"))
    return table.assign(n=table["dataset"].map(SEQUENCES))


def possible_counts(ratio: float, n: int) -> list[int]:
    """Every k for which k / n prints as this ratio with four digits; empty if there is none."""
    return [k for k in range(n + 1) if round(k / n, 4) == round(ratio, 4)]


def improvements() -> pd.DataFrame:
    """The printed Imp.% and the one computed from the HitRatios; `differs` where rounding cannot explain the gap."""
    results = printed_results()
    ilora = results["dataset"].map(results[results["system"] == "iLoRA"].set_index("dataset")["hit_ratio"])
    ratio = ilora / results["hit_ratio"]
    rounding = 0.5e-4 * (1 / ilora + 1 / results["hit_ratio"])  # largest relative error of the ratio
    computed = 100 * (ratio - 1)
    differs = (computed - results["imp"]).abs() > 100 * ratio * rounding + 0.005
    table = results[["dataset", "system", "hit_ratio", "imp"]].assign(computed=computed.round(2), differs=differs)
    return table[table["system"] != "iLoRA"].reset_index(drop=True)
