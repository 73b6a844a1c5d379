"""The embedded world: a small library, readers with tastes, and the true process that generates their histories.

A reader's next story follows from the last one. What *everybody* reads after a story is public (fixed by `PUBLIC_SEED`,
so that the embedded language model knows it); after a contested story, each taste group reads other stories.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

GROUPS, WINDOW, PUBLIC_SEED = 4, 10, 7
FOLLOW = 0.85  # probability of reading a follower of the last story; otherwise the reader browses
FOLLOWER_WEIGHTS = np.array([0.6, 0.3, 0.1])  # of a story's first, second and third follower
FAVOURED = 4.0  # how much more likely a browsing reader picks a story from the group's themes


@dataclass(frozen=True)
class World:
    """Items, events and the users' groups, with the probabilities that generated them, see `study.comparisons`."""

    items: pd.DataFrame  # id, title, text
    events: pd.DataFrame  # user, item, time
    groups: np.ndarray  # (users,)
    followers: np.ndarray  # (GROUPS, items, 3) of each story, before those of the last `WINDOW` steps are excluded
    browse: np.ndarray  # (GROUPS, items) probability that a browsing reader picks the story, before the same
    contested: np.ndarray  # (items,) bool


def titles() -> pd.DataFrame:
    """The library: id, title and text (its theme); every word occurs in one title only."""
    return pd.read_csv(Path(__file__).with_name("library.csv")).rename_axis("id").reset_index()


def make_world(users: int = 2000, conflict: float = 0.5, seed: int = 0, events_per_user: int = 20) -> World:
    """Generate a world; with the same seed, a larger share of contested stories, `conflict`, only adds some."""
    items = titles()
    public, rng = np.random.default_rng(PUBLIC_SEED), np.random.default_rng([PUBLIC_SEED, seed])
    shared = _draw_followers(public, len(items))
    by_group = np.stack([_draw_followers(rng, len(items)) for _ in range(GROUPS)])
    contested = rng.random(len(items)) < conflict
    followers = np.where(contested[:, None], by_group, shared)
    popularity = 1 / (10 + public.permutation(len(items)))  # decreases with a random rank
    favoured = items["text"].factorize()[0] % GROUPS == np.arange(GROUPS)[:, None]  # by each group: a quarter of themes
    browse = popularity * np.where(favoured, FAVOURED, 1)
    browse /= browse.sum(1, keepdims=True)
    groups = rng.integers(GROUPS, size=users)
    stories = _simulate(rng, groups, followers, browse, events_per_user)
    user = np.repeat(np.arange(users), events_per_user)
    events = pd.DataFrame({"user": user, "item": stories.T.ravel().astype(np.int64), "time": np.arange(len(user))})
    return World(items, events, groups, followers, browse, contested)


def _draw_followers(rng: np.random.Generator, n_items: int) -> np.ndarray:
    """(items, 3) distinct followers of each story, never the story itself."""
    order = rng.random((n_items, n_items))
    np.fill_diagonal(order, np.inf)
    return order.argsort(1)[:, : len(FOLLOWER_WEIGHTS)]


def _simulate(
    rng: np.random.Generator, groups: np.ndarray, followers: np.ndarray, browse: np.ndarray, steps: int
) -> np.ndarray:
    """(steps, users) stories; all readers take a step together, and none repeats a story of the last `WINDOW`."""
    n_items = browse.shape[1]
    ends = (np.cumsum(browse, 1) + np.arange(GROUPS)[:, None]).ravel()  # the probabilities of group g fill g to g + 1
    stories = np.empty((steps, len(groups)), np.int32)  # a step is contiguous in memory
    for step in range(steps):
        pending = np.arange(len(groups))
        while len(pending):  # sampling again after a repeat renormalises the probabilities exactly
            group, chance = groups[pending], rng.random(len(pending))
            item = (np.searchsorted(ends, group + chance) - group * n_items).clip(0, n_items - 1)
            if step:
                rank = rng.choice(len(FOLLOWER_WEIGHTS), size=len(pending), p=FOLLOWER_WEIGHTS)
                follow = rng.random(len(pending)) < FOLLOW
                item = np.where(follow, followers[group, stories[step - 1, pending], rank], item)
            repeats = (stories[max(0, step - WINDOW) : step, pending] == item).any(0)
            stories[step, pending[~repeats]] = item[~repeats]
            pending = pending[repeats]
    return stories
