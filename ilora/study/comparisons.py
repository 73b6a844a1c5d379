"""What pages say about several systems: tables and sentences, intervals over runs, and tests of paired differences."""

import numpy as np
import pandas as pd
from scipy import stats

from ilora.data.dataset import Dataset
from ilora.data.windows import Questions
from ilora.data.world import FOLLOW, FOLLOWER_WEIGHTS, GROUPS, WINDOW, World, make_world
from ilora.evaluation import compute_metrics, difference, outcomes_from_scores
from ilora.evaluation.metrics import resampled_means

PERMUTATIONS = 9999


def metric_table(systems: dict[str, pd.DataFrame], metric: str = "hit_ratio") -> pd.DataFrame:
    """Value, low, high and n of one metric, from the outcomes of each system that has the metric."""
    rows = {name: row[metric] for name, of in systems.items() if metric in (row := compute_metrics(of))}
    return pd.DataFrame(list(rows.values()), list(rows), ["value", "low", "high", "n"])


def formatted_metrics(systems: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The main metrics of each system's outcomes as "value [low, high]", and "-" where a system lacks one."""
    names = ["hit_ratio", "valid_ratio", "hit_ratio_of_valid", "rank_hit_ratio@1", "rank_ndcg@10"]
    rows = {system: compute_metrics(outcomes) for system, outcomes in systems.items()}
    cells = [[format_interval(row[name]) if name in row else "-" for name in names] for row in rows.values()]
    return pd.DataFrame(cells, index=list(rows), columns=names)


def format_interval(interval: dict[str, float]) -> str:
    """A value or a difference with its interval as text: "0.523 [0.491, 0.552]"."""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def difference_sentence(systems: dict[str, pd.DataFrame], first: str, second: str) -> str:
    """A sentence that says which of two systems has the higher HitRatio@1, for the title of a figure."""
    change = difference(systems[first], systems[second])
    if change["low"] <= 0 <= change["high"]:
        return f"The difference between {first} and {second} is not significant: {format_interval(change)}"
    if change["high"] < 0:
        return difference_sentence(systems, second, first)
    return f"{first} is above {second} by {format_interval(change)}"


def next_probability(world: World, history: np.ndarray) -> np.ndarray:
    """(n, GROUPS, items) probability of the next story, for histories (n, window) padded on the left."""
    probability = np.repeat((1 - FOLLOW) * world.browse[None], len(history), axis=0)
    row, group = np.arange(len(history))[:, None], np.arange(GROUPS)[None]
    for rank, weight in enumerate(FOLLOWER_WEIGHTS):
        probability[row, group, world.followers[:, history[:, -1], rank].T] += FOLLOW * weight
    excluded = np.zeros((len(history), len(world.items) + 1), bool)  # the last column is padding
    np.put_along_axis(excluded, history[:, -WINDOW:], True, axis=1)
    probability *= ~excluded[:, None, :-1]
    return probability / probability.sum(-1, keepdims=True)


def group_posterior(world: World, history: np.ndarray) -> np.ndarray:
    """(n, GROUPS) probability of each group, for histories (n, window) from the reader's first story on."""
    n_items = len(world.items)
    history = np.pad(history, ((0, 0), (1, 0)), constant_values=n_items)
    log_posterior = np.zeros((len(history), GROUPS))
    for step in range(1, history.shape[1]):
        item, previous = history[:, step], history[:, step - 1]
        first, later = (item < n_items) & (previous == n_items), previous < n_items
        log_posterior[first] += np.log(world.browse[:, item[first]]).T
        following = next_probability(world, history[later, :step])
        log_posterior[later] += np.log(following[np.arange(len(following)), :, item[later]])
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
    return posterior / posterior.sum(1, keepdims=True)


def best_choice(world: World, history: np.ndarray, candidates: np.ndarray, knows: str, group: np.ndarray) -> np.ndarray:
    """(n,) column that the best predictor chooses if it knows the "group" (n,), the "history" or "nothing"."""
    weights = {"group": np.eye(GROUPS)[group], "nothing": np.full((len(history), GROUPS), 1 / GROUPS)}
    weights = group_posterior(world, history) if knows == "history" else weights[knows]
    probability = np.einsum("ng,ngi->ni", weights, next_probability(world, history))
    return np.take_along_axis(probability, candidates, axis=1).argmax(1)


def best_possible_outcomes(dataset: Dataset, questions: Questions, conflict: float, users: int, seed: int) -> dict:
    """Outcomes of the best possible predictors in the world, by what they know; empty for real data."""
    if dataset.name != "world":
        return {}
    world, best = make_world(users=users, conflict=conflict, seed=seed), {}
    sequences, candidates = questions.sequences, questions.candidates
    for known in ("nothing", "history", "group"):
        column = best_choice(world, sequences.history, candidates, known, world.groups[sequences.user])
        best[f"best, knowing {known}"] = outcomes_from_scores(questions, np.eye(candidates.shape[1])[column])
    return best


def crossed_interval(values: np.ndarray, users: np.ndarray) -> dict[str, float | None]:
    """Mean of values (seeds, draws, n) with a 95% interval over training seeds, draws of candidates and users (n,).

    The variance of the mean is the sum of those over seeds, draws, and users as clusters. Each contains part of their
    interaction, so the sum errs on the large side. The interval is Student's, with Satterthwaite's degrees of freedom.
    p_student: of the mean being zero; error_*: standard errors of the mean, None for a source with one value;
    sd_draws: of one run's result over draws.
    """
    values = np.asarray(values, float)
    (seeds, draws, n), mean = values.shape, values.mean()
    of_users = _sum_by_user(values.mean((0, 1)) - mean, users)
    sizes, variance = {"seeds": seeds, "draws": draws, "users": len(of_users)}, {}
    if seeds > 1:
        variance["seeds"] = values.mean((1, 2)).var(ddof=1) / seeds
    if draws > 1:
        variance["draws"] = values.mean((0, 2)).var(ddof=1) / draws
    if len(of_users) > 1:
        variance["users"] = (of_users**2).sum() / n**2 * len(of_users) / (len(of_users) - 1)
    total = sum(variance.values())
    freedom = total**2 / sum(part**2 / (sizes[source] - 1) for source, part in variance.items()) if total else 1
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    p = 2 * stats.t.sf(abs(mean) / np.sqrt(total), freedom) if total else float(mean == 0)
    result = {"value": float(mean), "low": float(mean - half), "high": float(mean + half), "n": n, **sizes}
    for source in sizes:
        result[f"error_{source}"] = float(np.sqrt(variance[source])) if source in variance else None
    result["sd_draws"] = float(np.sqrt(values.mean(2).var(axis=1, ddof=1).mean())) if draws > 1 else None
    return result | {"p_student": p}


def _sum_by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums of values (n,) over the questions of each user."""
    return np.bincount(np.unique(users, return_inverse=True)[1], values)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test for the hits (n,) of two systems on the same questions."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    either = only_first + only_second
    return float(stats.binomtest(only_first, either).pvalue) if either else 1.0


def sign_flip_test(differences: np.ndarray, users: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of paired differences (n,), from all 2^users ways to flip users' signs, or PERMUTATIONS of them."""
    sums = _sum_by_user(differences, users)
    sums = sums[sums != 0]
    if len(sums) < 2:  # both signs are equally extreme
        return 1.0
    settings = {"permutation_type": "samples", "n_resamples": PERMUTATIONS, "batch": 1000, "vectorized": True}
    return float(stats.permutation_test((sums,), lambda x, axis: x.sum(axis), **settings, rng=seed).pvalue)


def holm(p: pd.Series) -> pd.Series:
    """p values adjusted by Holm's method; rejecting those below 0.05 keeps the familywise error rate at 5%."""
    ascending = p.sort_values()
    return (ascending * np.arange(len(p), 0, -1)).cummax().clip(upper=1)[p.index]


def paired_comparison(first: np.ndarray, second: np.ndarray, users: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compare the hits of two systems, (seeds, draws, n) each, on the same questions, paired run by run.

    A single run is paired with every run of the other system. Returns `crossed_interval` of the difference; `p` of
    `sign_flip_test` and a bootstrap over users of its mean; p of `mcnemar` over pairs of runs and draws.
    """
    first, second = np.broadcast_arrays(first, second)
    differences = first.astype(float) - second
    mean = differences.mean((0, 1))
    p = [mcnemar(*pair) for pair in zip(first.reshape(-1, len(mean)), second.reshape(-1, len(mean)), strict=True)]
    names = ("mcnemar_median", "mcnemar_least", "mcnemar_largest", "bootstrap_low", "bootstrap_high")
    quantiles = [*np.quantile(p, (0.5, 0, 1)), *np.quantile(resampled_means(mean, users, seed), (0.025, 0.975))]
    tests = {"p": sign_flip_test(mean, users, seed)} | dict(zip(names, map(float, quantiles), strict=True))
    return crossed_interval(differences, users) | tests
