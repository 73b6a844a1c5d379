import itertools

import numpy as np
import pytest
from scipy import stats

from ilora.data import make_world
from ilora.data.world import FOLLOW, FOLLOWER_WEIGHTS, GROUPS, WINDOW, titles
from ilora.study.comparisons import best_choice, group_posterior, next_probability

pytestmark = pytest.mark.filterwarnings("error")  # a RuntimeWarning of numpy fails the test


@pytest.fixture(scope="module")
def world():
    return make_world(users=400, conflict=0.5, seed=3)


def stories_of(world):
    """(users, events) item ids in order of time."""
    events = world.events.sort_values(["user", "time"])
    return events["item"].to_numpy().reshape(len(world.groups), -1)


def padded(history, width, n_items):
    return np.array([[n_items] * (width - len(history)) + list(history)])


# ---------------------------------------------------------------- the library


def test_titles_are_unique_and_each_word_occurs_once():
    library = titles()
    words = [word.casefold() for title in library["title"] for word in title.split()]
    assert len(words) == len(set(words)) == 2 * len(library) == 2 * 15 * 8
    assert library["title"].str.casefold().is_unique
    assert list(library["id"]) == list(range(len(library)))
    assert (library.groupby("text").size() == 15).all() and (library["text"] != "").all()


# ---------------------------------------------------------------- conflict


def test_the_contested_stories_of_a_smaller_conflict_are_contested_in_a_larger_one():
    worlds = [make_world(users=40, conflict=share, seed=1) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shares = [world.contested.mean() for world in worlds]
    assert shares[0] == 0 and shares[-1] == 1
    assert all(abs(share - conflict) < 0.15 for share, conflict in zip(shares, (0, 0.25, 0.5, 0.75, 1), strict=True))
    for less, more in itertools.pairwise(worlds):
        assert (more.contested | ~less.contested).all() and more.contested.sum() > less.contested.sum()
        kept = more.contested == less.contested
        np.testing.assert_array_equal(less.followers[:, kept], more.followers[:, kept])
        np.testing.assert_array_equal(less.groups, more.groups)
        np.testing.assert_array_equal(less.browse, more.browse)


def test_groups_agree_on_what_is_not_contested_and_differ_on_what_is(world):
    alike = (world.followers == world.followers[:1]).all((0, 2))
    assert alike[~world.contested].all()
    assert not alike[world.contested].any()


def test_public_knowledge_is_the_same_in_every_world():
    first, second = (make_world(users=40, conflict=0.0, seed=seed) for seed in (0, 1_000_000))
    np.testing.assert_array_equal(first.followers, second.followers)
    np.testing.assert_array_equal(first.browse, second.browse)
    assert not np.array_equal(first.groups, second.groups)


def test_the_same_seed_draws_the_same_world():
    first, repeated, different = (make_world(users=40, seed=seed) for seed in (5, 5, 6))
    assert first.events.equals(repeated.events)
    assert not first.events.equals(different.events)


def test_followers_are_distinct_and_never_the_story_itself(world):
    story = np.arange(len(world.items))[None, :, None]
    assert (world.followers != story).all()
    assert (np.diff(np.sort(world.followers, axis=2), axis=2) > 0).all()


# ---------------------------------------------------------------- probabilities and simulation


def test_next_probability_is_the_written_out_mixture(world):
    history = [5, 40, 17]
    last = history[-1]
    probability = next_probability(world, padded(history, WINDOW, len(world.items)))[0]
    for group in range(GROUPS):
        expected = (1 - FOLLOW) * world.browse[group]
        for weight, follower in zip(FOLLOWER_WEIGHTS, world.followers[group, last], strict=True):
            expected[follower] += FOLLOW * weight
        expected[history] = 0
        np.testing.assert_allclose(probability[group], expected / expected.sum(), rtol=1e-12)


def test_next_probability_excludes_the_last_stories_but_not_earlier_ones(world):
    history = np.arange(WINDOW + 3)[None]
    probability = next_probability(world, history)[0]
    assert (probability[:, 3 : WINDOW + 3] == 0).all()
    assert (probability[:, :3] > 0).all()
    np.testing.assert_allclose(probability.sum(1), 1)


def test_no_story_is_read_again_within_the_window(world):
    read = stories_of(world)
    for gap in range(1, WINDOW + 1):
        assert (read[:, gap:] != read[:, :-gap]).all()
    assert (read[:, WINDOW + 1 :] == read[:, : -WINDOW - 1]).any()  # later it may be


def test_the_simulation_matches_next_probability():
    """Each step's story as a place in the cumulated probabilities, randomised within its share: uniform if right."""
    world = make_world(users=3000, conflict=0.5, seed=2, events_per_user=WINDOW + 3)
    read, users, rng = stories_of(world), np.arange(3000), np.random.default_rng(0)
    for step in (1, 2, WINDOW + 2):
        probability = next_probability(world, read[:, :step])[users, world.groups]
        chosen = read[:, step]
        below = np.take_along_axis(np.cumsum(probability, 1), chosen[:, None], 1)[:, 0]
        place = below - probability[users, chosen] * rng.random(len(users))
        assert stats.kstest(place, "uniform").pvalue > 0.001
        ranked = (probability > probability[users, chosen][:, None]).sum(1)  # 0 where the most likely one was read
        best = probability.max(1)
        error = np.sqrt((best * (1 - best)).sum())
        assert abs((ranked == 0).sum() - best.sum()) < 4 * error
    opening = np.bincount(read[world.groups == 1, 0], minlength=len(world.items))
    assert stats.chisquare(opening, world.browse[1] * opening.sum()).pvalue > 0.001


# ---------------------------------------------------------------- what can be known


def brute_force_posterior(world, history):
    """Bayes' rule written out for one history without padding."""
    likelihood = np.ones(GROUPS)
    for group in range(GROUPS):
        likelihood[group] = world.browse[group, history[0]]
        for step in range(1, len(history)):
            past = history[:step]
            weight = (1 - FOLLOW) * world.browse[group]
            for share, follower in zip(FOLLOWER_WEIGHTS, world.followers[group, past[-1]], strict=True):
                weight[follower] += FOLLOW * share
            weight[past[-WINDOW:]] = 0
            likelihood[group] *= weight[history[step]] / weight.sum()
    return likelihood / likelihood.sum()


def test_group_posterior_is_bayes_rule(world):
    read, n_items = stories_of(world), len(world.items)
    for user, length in ((0, 3), (1, 7), (2, 10), (3, 1), (4, 14)):
        history = read[user, :length]
        expected = brute_force_posterior(world, history)
        for width in (length, length + 4):
            posterior = group_posterior(world, padded(history, width, n_items))[0]
            np.testing.assert_allclose(posterior, expected, rtol=1e-9)


def test_group_posterior_of_a_batch_is_that_of_its_rows(world):
    read = stories_of(world)[:20, :WINDOW]
    batch = np.where(np.arange(WINDOW)[None] < np.arange(20)[:, None] % WINDOW, len(world.items), read)
    rows = np.concatenate([group_posterior(world, row[None]) for row in batch])
    np.testing.assert_allclose(group_posterior(world, batch), rows, rtol=1e-12)


def test_group_posterior_is_the_prior_at_first_then_calibrated(world):
    n_items = len(world.items)
    np.testing.assert_allclose(group_posterior(world, np.full((2, WINDOW), n_items)), 1 / GROUPS)
    posterior = group_posterior(world, stories_of(world)[:, :WINDOW])
    of_true_group = posterior[np.arange(len(posterior)), world.groups]
    assert of_true_group.mean() > 0.75
    for low, high in ((0.0, 0.2), (0.8, 1.0)):  # calibrated: right as often as it says
        sure = (posterior >= low) & (posterior <= high)
        right = np.equal(world.groups[:, None], np.arange(GROUPS))[sure]
        error = np.sqrt((posterior[sure] * (1 - posterior[sure])).sum())
        assert abs(right.sum() - posterior[sure].sum()) < 4 * error + 1


def questions(world, length=WINDOW, seed=0):
    """Histories (users, length), 20 candidates with the target in a random column, and that column."""
    read, rng = stories_of(world), np.random.default_rng(seed)
    history, target = read[:, :length], read[:, length]
    weight = rng.random((len(read), len(world.items)))
    np.put_along_axis(weight, history, 2, axis=1)
    np.put_along_axis(weight, target[:, None], 2, axis=1)
    candidates = weight.argsort(1)[:, :20]
    column = rng.integers(20, size=len(read))
    candidates[np.arange(len(read)), column] = target
    return history, candidates, column


def test_more_knowledge_gives_better_predictions_and_popularity_is_worst():
    world = make_world(users=3000, conflict=1.0, seed=4)
    history, candidates, column = questions(world, length=2)
    right = {
        knows: (best_choice(world, history, candidates, knows, world.groups) == column).mean()
        for knows in ("nothing", "history", "group")
    }
    popular = world.browse.mean(0)[candidates].argmax(1) == column
    assert right["group"] > right["history"] + 0.01 and right["history"] > right["nothing"] + 0.1
    assert right["nothing"] > popular.mean() + 0.1 and popular.mean() > 0.05


def test_without_conflict_the_group_hardly_matters():
    world = make_world(users=2000, conflict=0.0, seed=4)
    history, candidates, column = questions(world)
    group, nothing = (
        best_choice(world, history, candidates, knows, world.groups) == column for knows in ("group", "nothing")
    )
    assert abs(group.mean() - nothing.mean()) < 0.03


def test_best_choice_is_the_most_likely_candidate_of_the_known_group(world):
    history, candidates, _ = questions(world)
    choice = best_choice(world, history, candidates, "group", world.groups)
    for user in range(20):
        probability = next_probability(world, history[user : user + 1])[0, world.groups[user]]
        assert probability[candidates[user, choice[user]]] == probability[candidates[user]].max()
