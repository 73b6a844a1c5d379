"""What the paper's Table 1 prints, and what follows from it by arithmetic alone.

    HitRatio@1  a share of the test sequences (95, 122 and 1,186) to four digits, hence a count of right answers
    Imp.%       how much higher iLoRA's HitRatio@1 is, in per cent of the row's

The functions take and give plain numbers; a page shows them one by one.
"""

import numpy as np
import pandas as pd
from scipy import stats

# Test rows that are asked of LLaRA's release, which the paper uses. Steam has 1,194; 8 are shorter than three items.
SEQUENCES = {"LastFM": 122, "MovieLens": 95, "Steam": 1186}
LLARA_MENDED = {"LastFM": 0.5246, "MovieLens": 0.4526, "Steam": 0.5051}  # HitRatio@1 by the README of its later release
OURS = {"LastFM": "lastfm", "MovieLens": "movielens", "Steam": "steam"}  # the names that `data.load` knows

_TABLE = """
system    LastFM valid hit     imp      MovieLens valid hit   imp       Steam valid hit   imp
GRU4Rec   1.0000       0.2616  91.13    1.0000          0.3750 40.67    1.0000      0.4168 26.30
Caser     1.0000       0.2233  123.91   1.0000          0.3861 36.62    1.0000      0.4368 20.51
SASRec    1.0000       0.2233  123.91   1.0000          0.3444 53.16    1.0000      0.4010 31.27
Llama2    0.3443       0.0246  1932.52  0.4421          0.0421 1152.97  0.1653      0.0135 3799.26
ChatRec   1.0000       0.3770  32.63    0.9895          0.2000 163.75   0.9798      0.3626 45.17
MoRec     1.0000       0.1652  202.66   1.0000          0.2822 86.92    1.0000      0.3911 34.59
TALLRec   0.9836       0.4180  19.62    0.9263          0.3895 35.43    0.9840      0.4637 13.52
LLaRA     1.0000       0.4508  8.51     0.9684          0.4421 19.32    0.9975      0.4949 6.36
iLoRA     1.0000       0.5000  nan      0.9891          0.5275 nan      0.9981      0.5264 nan
"""


def table() -> pd.DataFrame:
    """Table 1 in long form: dataset, system, valid_ratio, hit_ratio, imp (per cent), n (test sequences)."""
    rows = []
    for line in _TABLE.strip().splitlines()[1:]:
        system, *numbers = line.split()
        for dataset, own in zip(SEQUENCES, np.array(numbers, float).reshape(3, 3), strict=True):
            rows.append((dataset, system, *own, SEQUENCES[dataset]))
    return pd.DataFrame(rows, columns=["dataset", "system", "valid_ratio", "hit_ratio", "imp", "n"])


def counts(ratio: float, n: int, digits: int = 4) -> list[int]:
    """The numbers k of n sequences for which k / n prints as this ratio; none if there is no such number."""
    return [k for k in range(n + 1) if round(k / n, digits) == round(ratio, digits)]


def divisors(ratio: float, largest: int, digits: int = 4) -> list[tuple[int, int]]:
    """(k, n) with k / n printing as this ratio, n up to `largest`: what else it may be a share of."""
    return [(k, n) for n in range(1, largest + 1) for k in counts(ratio, n, digits)]


def wilson(ratio: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent sequences, the ratio taken as the nearest count (Wilson 1927)."""
    interval = stats.binomtest(round(ratio * n), n).proportion_ci(method="wilson")
    return interval.low, interval.high


def two_proportions(one: float, other: float, n: int) -> float:
    """Two-sided p that two shares of n sequences each are equal (pooled z test).

    It takes the two systems as asked different sequences. They were asked the same, and a paired test would see more;
    it needs each answer, which no table prints.
    """
    pooled = (one + other) / 2
    z = (one - other) / np.sqrt(2 * pooled * (1 - pooled) / n)
    return float(2 * stats.norm.sf(abs(z)))


def audit(system: str = "LLaRA") -> pd.DataFrame:
    """iLoRA against a row of Table 1: both shares, iLoRA's Wilson interval, p, one row a data set."""
    rows = {}
    for dataset, own in table().set_index("system").groupby("dataset"):
        n, ours, theirs = SEQUENCES[dataset], own.loc["iLoRA", "hit_ratio"], own.loc[system, "hit_ratio"]
        low, high = wilson(ours, n)
        p = two_proportions(ours, theirs, n)
        rows[dataset] = {"n": n, "iLoRA": ours, "low": low, "high": high, system: theirs, "p": p}
    return pd.DataFrame.from_dict(rows, orient="index")


def together(p: pd.Series) -> float:
    """One two-sided p for several independent two-sided ones that point the same way (Stouffer)."""
    return float(2 * stats.combine_pvalues(p / 2, method="stouffer").pvalue)


def improvements() -> pd.DataFrame:
    """The Imp.% column beside what the two HitRatios give, per cent; `differs` by more than rounding can make."""
    printed = table()
    best = printed[printed["system"] == "iLoRA"].set_index("dataset")["hit_ratio"]
    printed = printed[printed["system"] != "iLoRA"].reset_index(drop=True)
    ratio = printed["dataset"].map(best) / printed["hit_ratio"]
    half = 0.5e-4 * (1 / printed["dataset"].map(best) + 1 / printed["hit_ratio"])  # relative, of both roundings
    computed = 100 * (ratio - 1)
    differs = (computed - printed["imp"]).abs() > 100 * ratio * half + 0.005
    columns = {"computed": computed.round(2), "differs": differs}
    return printed[["dataset", "system", "hit_ratio", "imp"]].assign(**columns)
