"""The embedded world: a small library, readers with tastes, and the truth behind their histories.

A reader's next story follows from the last one. What *everybody* reads after a story is public knowledge
(`PUBLIC_SEED` fixes it, so the embedded language model can have read it); on a contested story each taste
group has followers of its own. `conflict` is the share of contested stories: at 0 all groups agree, at 1
they agree on nothing. The best attainable HitRatio@1 follows from the same tables, see `World.best_choice`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

GROUPS, WINDOW, PUBLIC_SEED = 4, 10, 7
FOLLOW = 0.85  # probability of reading a follower of the last story, otherwise the reader browses
FOLLOWER_WEIGHTS = np.array([0.6, 0.3, 0.1])  # of a story's first, second and third follower
FAVOURED = 4.0  # how much likelier a browsing reader picks a story from the group's themes

# theme -> first words, second words; every word occurs in one title only
THEMES = {
    "sea": (
        "Salted Drowned Tidal Coral Anchored Foaming Stormy Pearl "
        "Sunken Briny Drifting Northern Barnacled Moonlit Windward",
        "Lighthouse Galleon Mermaid Harbour Compass Whale Lagoon Sailor "
        "Reef Schooner Current Fisherman Cove Octopus Voyage",
    ),
    "mountain": (
        "Granite Frozen Lofty Hollow Misty Jagged Avalanche Alpine "
        "Crumbling Silver Echoing Barren Steep Ancient Shepherd's",
        "Summit Glacier Ridge Hermit Valley Boulder Monastery Climber Ravine Goat Plateau Cavern Beacon Lodge Eagle",
    ),
    "city": (
        "Crowded Neon Midnight Copper Paved Restless Concrete Bustling "
        "Smoky Gilded Rainy Borrowed Vertical Electric Narrow",
        "Tramway Rooftop Alley Skyline Cinema Detective Bridge Fountain "
        "Market Subway Tenement Newspaper Elevator Balcony Plaza",
    ),
    "forest": (
        "Mossy Whispering Tangled Emerald Fallen Thorny Wandering Buried "
        "Feral Amber Rooted Wooden Hidden Dappled Croaking",
        "Oak Badger Clearing Mushroom Owl Thicket Fern Woodcutter Fox Cottage Acorn Stream Wolf Lantern Trail",
    ),
    "space": (
        "Orbital Distant Silent Lunar Radiant Weightless Stellar Broken "
        "Crimson Eternal Magnetic Binary Frontier Spinning Dark",
        "Comet Station Satellite Nebula Pilot Asteroid Signal Telescope "
        "Eclipse Rocket Planet Android Galaxy Horizon Capsule",
    ),
    "kitchen": (
        "Bitter Honeyed Peppered Burnt Sugared Floury Roasted Velvet "
        "Sour Buttered Spiced Grandmother's Golden Pickled Simmering",
        "Kettle Apron Bakery Orchard Recipe Spoon Cellar Pie Teapot Onion Banquet Oven Vineyard Cinnamon Pantry",
    ),
    "music": (
        "Muted Trembling Brass Forgotten Rhythmic Humming Velvety Blue "
        "Unfinished Dancing Minor Travelling Plucked Soaring Brilliant",
        "Violin Cadence Orchestra Drummer Ballad Piano Chorus Fiddle "
        "Waltz Trumpet Nocturne Conductor Melody Jukebox Encore",
    ),
    "winter": (
        "Snowbound Icy Crystal Pale Shivering Quiet Woollen December Frosted Huddled Polar Lonely Glittering Long Grey",
        "Sleigh Mitten Blizzard Chimney Reindeer Icicle Cabin Skater Candle Solstice Drift Hearth Scarf Snowman Aurora",
    ),
}


@dataclass(frozen=True)
class World:
    """Items, events and users' groups, with the tables that generated them.

    `followers[g, i]` are the three followers of story i in group g, `browse[g]` is the distribution over
    stories of a browsing reader, both before stories read within the last `WINDOW` steps are left out.
    """

    items: pd.DataFrame  # id, title, text
    events: pd.DataFrame  # user, item, time
    groups: np.ndarray  # (users,)
    followers: np.ndarray  # (GROUPS, items, 3)
    browse: np.ndarray  # (GROUPS, items)
    contested: np.ndarray  # (items,) bool

    def next_probability(self, history: np.ndarray) -> np.ndarray:
        """(n, GROUPS, items) probability of the next story, for histories (n, window) padded on the left."""
        n_items = len(self.items)
        last = history[:, -1]
        probability = np.repeat((1 - FOLLOW) * self.browse[None], len(history), axis=0)
        rows, group = np.arange(len(history))[:, None], np.arange(GROUPS)[None]
        for rank, weight in enumerate(FOLLOWER_WEIGHTS):
            probability[rows, group, self.followers[:, last, rank].T] += FOLLOW * weight
        read = np.zeros((len(history), n_items + 1), bool)
        np.put_along_axis(read, history[:, -WINDOW:], True, axis=1)
        probability *= ~read[:, None, :n_items]
        return probability / probability.sum(-1, keepdims=True)

    def group_posterior(self, history: np.ndarray) -> np.ndarray:
        """(n, GROUPS) probability of each group after a history (n, window): Bayes' rule from equal priors.

        Exact for a whole history; of a window cut out of a longer one, the first story is taken as an opening.
        """
        n_items = len(self.items)
        history = np.pad(history, ((0, 0), (1, 0)), constant_values=n_items)
        log_posterior = np.zeros((len(history), GROUPS))
        for step in range(1, history.shape[1]):
            item, opens = history[:, step], history[:, step - 1] == n_items
            first, later = (item < n_items) & opens, (item < n_items) & ~opens
            log_posterior[first] += np.log(self.browse[:, item[first]]).T
            following = self.next_probability(history[later, :step])
            log_posterior[later] += np.log(following[np.arange(len(following)), :, item[later]])
        posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
        return posterior / posterior.sum(1, keepdims=True)

    def best_choice(
        self, history: np.ndarray, candidates: np.ndarray, knows: str, group: np.ndarray | None = None
    ) -> np.ndarray:
        """(n,) column of the candidate that the best predictor picks; no model can beat it on average.

        `knows="group"` is told each reader's `group` (n,); `knows="history"` infers it from the history;
        `knows="nothing"` takes all groups as equally likely, as a model does that treats readers alike.
        """
        weights = {
            "group": lambda: np.eye(GROUPS)[group],
            "history": lambda: self.group_posterior(history),
            "nothing": lambda: np.full((len(history), GROUPS), 1 / GROUPS),
        }[knows]()
        probability = np.einsum("ng,ngi->ni", weights, self.next_probability(history))
        return np.take_along_axis(probability, candidates, axis=1).argmax(1)


def titles() -> pd.DataFrame:
    """The library: id, title, text (its theme)."""
    rows = [
        (f"{first} {second}", f"a {theme} story")
        for theme, (firsts, seconds) in THEMES.items()
        for first, second in zip(firsts.split(), seconds.split(), strict=True)
    ]
    return pd.DataFrame(rows, columns=["title", "text"]).rename_axis("id").reset_index()


def make_world(users: int = 2000, conflict: float = 0.5, seed: int = 0, events_per_user: int = 20) -> World:
    """Draw a world; `conflict` in [0, 1] is the share of stories whose followers differ between groups.

    The same seed contests the same stories first, so that a sweep over `conflict` changes one thing.
    """
    items = titles()
    public, rng = np.random.default_rng(PUBLIC_SEED), np.random.default_rng([PUBLIC_SEED, seed])
    shared = _draw_followers(public, len(items))
    own = np.stack([_draw_followers(rng, len(items)) for _ in range(GROUPS)])
    contested = rng.random(len(items)) < conflict
    followers = np.where(contested[None, :, None], own, shared[None])
    browse = _browse(public, items)
    groups = rng.integers(GROUPS, size=users)
    events = _simulate(rng, groups, followers, browse, events_per_user)
    return World(items, events, groups, followers, browse, contested)


def _draw_followers(rng: np.random.Generator, n_items: int) -> np.ndarray:
    """(items, 3) distinct followers of each story, never the story itself."""
    order = rng.random((n_items, n_items))
    np.fill_diagonal(order, np.inf)
    return order.argsort(1)[:, : len(FOLLOWER_WEIGHTS)]


def _browse(rng: np.random.Generator, items: pd.DataFrame) -> np.ndarray:
    """(GROUPS, items): popularity falls off with a random rank; each group favours a quarter of the themes."""
    popularity = 1 / (10 + rng.permutation(len(items)))
    theme = items["text"].factorize()[0]
    favoured = theme[None] % GROUPS == np.arange(GROUPS)[:, None]
    weight = popularity * np.where(favoured, FAVOURED, 1)
    return weight / weight.sum(1, keepdims=True)


def _simulate(
    rng: np.random.Generator, groups: np.ndarray, followers: np.ndarray, browse: np.ndarray, events_per_user: int
) -> pd.DataFrame:
    """All readers take their steps together; a story of the last `WINDOW` steps is not read again."""
    n_items, users = browse.shape[1], len(groups)
    cumulative = np.cumsum(browse, 1)
    read = np.empty((events_per_user, users), np.int32)  # a step's stories lie together
    for step in range(events_per_user):
        pending = np.arange(users)
        while len(pending):  # draw again where the drawn story was read lately: renormalises exactly
            group, chance = groups[pending], rng.random(len(pending))
            item = np.empty(len(pending), np.int32)
            for own in range(GROUPS):
                item[group == own] = np.searchsorted(cumulative[own], chance[group == own])
            item = item.clip(max=n_items - 1)
            if step:
                rank = rng.choice(len(FOLLOWER_WEIGHTS), size=len(pending), p=FOLLOWER_WEIGHTS)
                follow = rng.random(len(pending)) < FOLLOW
                item = np.where(follow, followers[group, read[step - 1, pending], rank], item)
            again = (read[max(0, step - WINDOW) : step, pending] == item).any(0)
            read[step, pending[~again]] = item[~again]
            pending = pending[again]
    user = np.repeat(np.arange(users), events_per_user)
    return pd.DataFrame({"user": user, "item": read.T.ravel().astype(np.int64), "time": np.arange(len(user))})
