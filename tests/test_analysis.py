import numpy as np
import pandas as pd
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform

from ilora import analysis, runs
from ilora.data import Sequences
from ilora.language_model import load_language_model
from ilora.model import TARGET_MODULES, LanguageRecommender, Questions, adapter_config
from ilora.prompts import Prompts
from ilora.recommenders import SASRec
from ilora.training import TrainingArguments, fit, load_snapshot
from ilora.world import titles

TITLES = list(titles()["title"][:60])
LABELS = np.array([2, 0, 2, 1, 2, 0, 2, 2, 1, 2, 2])  # groups of 2, 2 and 7


def questions(n=11, seed=0):
    rng = np.random.default_rng(seed)
    history = np.stack([rng.permutation(60)[:7] for _ in range(n)])
    target, length = history[:, 6], rng.integers(1, 7, size=n)
    history = np.where(np.arange(6)[None] < 6 - length[:, None], 60, history[:, :6])
    return Questions(Sequences(np.arange(n), length, history, length, target), 60, seed)


def make(adapter, dropout=0.0, dtype=torch.float64):
    """A recommender around the embedded model whose adapter matters, in double precision."""
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    torch.manual_seed(1)
    encoder = SASRec(60, window=6)
    torch.nn.init.normal_(encoder.items.weight, std=0.3)
    config = adapter_config(rank=4, dropout=dropout, **adapter) if adapter else None
    model = LanguageRecommender(language_model, Prompts(tokenizer, TITLES, "story", "read"), encoder, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.03 * torch.randn_like(parameter)
            if "W_g" in name:
                parameter *= 5  # experts of clearly unlike weight
    return model.to(dtype).eval()


ADAPTERS = {
    "LoRA": {"experts": 1},
    "iLoRA": {"experts": 4},
    "per layer": {"experts": 2, "gate_per_layer": True},
    "convolutional": {"experts": 2, "gate": "convolutional"},
}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(("kind", "batch_size"), [*((kind, 3) for kind in ADAPTERS), ("iLoRA", 32)])
def test_gradients_of_groups_are_sums_of_a_backward_for_each_sequence(kind, batch_size):
    model, asked = make(ADAPTERS[kind], dropout=0.2), questions()
    model.train()  # dropout is left out all the same
    found = analysis.gradients(model, asked, LABELS, batch_size)
    gates = [] if kind == "LoRA" else ["gate"]
    assert list(found) == [*TARGET_MODULES[:4], *TARGET_MODULES[4:], *gates]
    model.eval()
    expected = {name: torch.zeros(3, part.shape[1], dtype=torch.float64) for name, part in found.items()}
    for row, label in enumerate(LABELS):
        model.zero_grad()
        model(model.collate([asked[row]]), progress=1.0).backward()
        for name in found:
            own = [
                p for n, p in model.named_parameters() if p.requires_grad and f"{name}." in n and "lora_gate" not in n
            ]
            if name == "gate":
                own = [p for n, p in model.named_parameters() if "lora_gate" in n]
            expected[name][label] += torch.cat([parameter.grad.flatten() for parameter in own])
    for name, part in found.items():
        torch.testing.assert_close(part, expected[name], rtol=1e-9, atol=1e-12)
        assert part.norm(dim=1).min() > 1e-3  # far above the tolerance
    assert len(found) == len(TARGET_MODULES) + len(gates)


def test_gradients_leave_the_model_as_it_was():
    model, asked = make(ADAPTERS["iLoRA"]), questions()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis.gradients(model, asked, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_experts_keep_sequences_apart():
    """Sequences that a gate sends to different experts alone have orthogonal gradients of A and B."""
    model, asked = make(ADAPTERS["iLoRA"]), questions(2)
    z = torch.from_numpy(analysis.representations(model.encoder, asked.sequences.history))
    gate = next(p for name, p in model.named_parameters() if "W_g" in name)
    with torch.no_grad():
        gate.zero_()
        gate[:2] = 50 * torch.linalg.pinv(z).T  # the first sequence to expert 0, the second to expert 1
    weights = model.gate_weights(list(asked))
    torch.testing.assert_close(weights[:, :2], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    cosines = analysis.cosines(analysis.products(analysis.gradients(model, asked, np.arange(2))))
    assert abs(cosines["all"][0, 1]) < 1e-9
    with torch.no_grad():
        gate.zero_()
    cosines = analysis.cosines(analysis.products(analysis.gradients(model, asked, np.arange(2))))
    assert abs(cosines["all"][0, 1]) > 1e-3


def test_while_b_is_zero_only_b_has_a_gradient():
    model, asked = make(ADAPTERS["LoRA"]), questions()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = analysis.gradients(model, asked, LABELS)
    of_b = [p.numel() for n, p in model.named_parameters() if "q_proj.lora_B" in n]
    assert (found["q_proj"] != 0).sum() <= 3 * sum(of_b) < found["q_proj"].numel()
    assert np.isfinite(analysis.cosines(analysis.products(found))["all"]).all()


@pytest.mark.parametrize("labels", [LABELS[:-1], np.where(LABELS == 1, 0, LABELS), LABELS - 1])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        analysis.gradients(make(ADAPTERS["LoRA"]), questions(), labels)


def test_a_model_without_adapter_is_refused():
    with pytest.raises(runs.UserError, match="no adapter"):
        analysis.gradients(make(None), questions(), LABELS)


def test_products_along_are_those_of_the_kept_states(tmp_path):
    model, asked = make(ADAPTERS["iLoRA"], dtype=torch.float32), questions()
    arguments = TrainingArguments(epochs=2, batch_size=4, learning_rate=0.05, snapshots=2, device="cpu")
    fit(model, asked, arguments, tmp_path)
    kept = sorted((tmp_path / "snapshots").iterdir())
    asked.set_epoch(0)
    with torch.no_grad():  # not a state of training, to see that it comes back
        for value in model.trainable_state().values():
            value *= 1.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = analysis.products_along(model, kept, asked, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for place, path in enumerate(kept):
        load_snapshot(model, path)
        expected = analysis.products(analysis.gradients(model, asked, LABELS))
        for kind, part in expected.items():
            np.testing.assert_allclose(found[kind][place], part, rtol=1e-5)
    assert not np.allclose(found["q_proj"][0], found["q_proj"][1], rtol=0.01)


# ---------------------------------------------------------------- similarity

VECTORS = {
    "one": torch.tensor([[2.0, 0], [0, 3], [-1, 0]]),
    "two": torch.tensor([[1.0], [4], [1]]),
    "gate": torch.tensor([[1.0], [1], [0]]),
}


def test_cosines_of_known_vectors():
    found = analysis.cosines(analysis.products(VECTORS))
    assert list(found) == ["all", "one", "two"]
    np.testing.assert_allclose(found["one"], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(found["two"], np.ones((3, 3)), atol=1e-7)
    a, b, c = 4 / 5**0.5 / 5, -1 / 10**0.5, 4 / 5 / 2**0.5
    np.testing.assert_allclose(found["all"], [[1, a, b], [a, 1, c], [b, c, 1]], atol=1e-7)
    with_gate = analysis.cosines(analysis.products({name: VECTORS[name][:2] for name in ("one", "gate")}), gate=True)
    assert list(with_gate) == ["all", "one", "gate"]
    np.testing.assert_allclose(with_gate["all"][0, 1], 1 / 5**0.5 / 10**0.5, atol=1e-7)


def test_a_zero_gradient_has_no_direction():
    with pytest.raises(runs.UserError, match="zero"):
        analysis.cosines(analysis.products({"one": torch.tensor([[1.0, 0], [0, 0]])}))


def test_halves_join_to_the_whole():
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(len(LABELS), 5)))
    cut = analysis.halves(LABELS)
    np.testing.assert_array_equal(cut // 2, LABELS)
    assert np.bincount(cut).tolist() == [1, 1, 1, 1, 4, 3]

    def sums(labels):
        return torch.stack([vectors[labels == label].sum(0) for label in np.unique(labels)])

    whole, parts = (analysis.products({"one": sums(labels)}) for labels in (LABELS, cut))
    np.testing.assert_allclose(analysis.joined(parts)["one"], whole["one"])
    stacked = {"one": np.stack([parts["one"], 2 * parts["one"]])}
    np.testing.assert_allclose(analysis.joined(stacked)["one"], [whole["one"], 2 * whole["one"]])


def test_repeatability_is_the_similarity_of_another_sample():
    rng, size = np.random.default_rng(0), 200_000
    signal = rng.normal(size=(3, size)) * np.array([[0.0], [0.5], [2.0]])
    half = np.repeat(signal, 2, axis=0) / 2 + rng.normal(size=(6, size)) * np.sqrt(0.5)
    other = signal + rng.normal(size=(3, size))
    drawn = np.vstack([half[::2] + half[1::2], other])
    expected = np.diag(analysis._cosine(drawn @ drawn.T)[:3, 3:])
    np.testing.assert_allclose(analysis.repeatability(analysis._cosine(half @ half.T)), expected, atol=0.01)
    assert np.ptp(expected) > 0.5


def test_pairs_are_in_the_order_of_pdist():
    points = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_array_equal(analysis.off_diagonal(squareform(pdist(points))), pdist(points))


def symmetric(rng, n):
    return squareform(rng.normal(size=n * (n - 1) // 2))


def test_the_permutation_test_is_level_under_independence():
    """Distances of points share members, so that a test of pairs as if independent would reject too often."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(200):
        one, other = (squareform(pdist(rng.normal(size=(8, 1)))) for _ in range(2))
        p.append(analysis.mantel(one, other, permutations=99)["p"])
    for level in (0.1, 0.3, 0.5, 0.8):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / 200)


def test_a_planted_relation_is_found_with_its_sign():
    rng = np.random.default_rng(0)
    distance = squareform(pdist(rng.normal(size=(8, 3))))
    similarity = -distance + 0.2 * symmetric(rng, 8)
    found = analysis.mantel(similarity, distance, permutations=999)
    assert found["value"] < -0.8 and found["p"] < 0.01
    assert (found["pairs"], found["members"]) == (28, 8)
    assert analysis.mantel(-(distance**3), distance, permutations=9)["value"] == pytest.approx(-1)  # ranks
    assert analysis.mantel(symmetric(rng, 8), distance, permutations=99)["p"] > 0.05


def test_pairs_are_ranked_and_shown():
    asked = questions(4)
    similarity = squareform([0.1, 0.9, -0.5, 0.2, 0.3, 0.0])
    pairs = analysis.ranked_pairs(similarity)
    assert pairs["similarity"].tolist() == [0.9, 0.3, 0.2, 0.1, 0.0, -0.5]
    assert pairs.iloc[0][["one", "other"]].tolist() == [0, 2] and pairs.iloc[-1][["one", "other"]].tolist() == [0, 3]
    table = analysis.side_by_side(asked, pairs.iloc[0], TITLES)
    assert list(table.columns) == ["user 0", "user 2"] and list(table.index) == [1, 2, 3, 4, 5, 6, "next"]
    history, _, target = asked[2]
    read = [title for title in table["user 2"] if title]
    assert read == [*(TITLES[item] for item in history), TITLES[target]]


# ---------------------------------------------------------------- clusters


def blobs(n=40, seed=0):
    """Eight clouds along a curve, in mixed order; the place on the curve of each point."""
    rng = np.random.default_rng(seed)
    place = rng.permutation(np.repeat(np.arange(8), n // 8))
    return np.stack([3.0 * place, 0.3 * place**2], axis=1) + 0.05 * rng.normal(size=(n, 2)), place


def test_clusters_are_found_and_near_ones_have_near_numbers():
    z, place = blobs()
    labels, centres = analysis.clusters(z)
    assert all(len(set(labels[place == p])) == 1 for p in range(8)) and len(set(labels)) == 8
    np.testing.assert_allclose(centres, [z[labels == label].mean(0) for label in range(8)])
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    mixed = np.linalg.norm(np.diff(centres[[0, 4, 1, 5, 2, 6, 3, 7]], axis=0), axis=1)
    assert steps.sum() < mixed.sum()
    along = np.array([place[labels == label][0] for label in range(8)])
    assert linkage(centres).shape == (7, 4) and np.abs(np.diff(along)).max() <= 4
    again, _ = analysis.clusters(z)
    np.testing.assert_array_equal(again, labels)


def test_too_few_distinct_sequences_are_refused():
    with pytest.raises(runs.UserError, match="8 clusters"):
        analysis.clusters(np.repeat(np.eye(4), 10, axis=0))


def test_representations_do_not_depend_on_the_batch():
    encoder, asked = SASRec(60, window=6).eval(), questions()
    found = analysis.representations(encoder, asked.sequences.history, batch_size=4)
    assert found.shape == (len(LABELS), 64)
    with torch.no_grad():
        expected = encoder.encode(torch.from_numpy(asked.sequences.history)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- gates


def test_a_constant_gate_is_flagged():
    users = np.arange(50)
    constant = np.tile([0.7, 0.1, 0.1, 0.1], (50, 1)) + 1e-4 * np.random.default_rng(0).normal(size=(50, 4))
    found = analysis.gate_statistics(constant, users)
    assert found["constant"] and found["personal"] < 1e-3
    assert found["leads"] == [1, 0, 0, 0]
    np.testing.assert_allclose(found["use"], [0.7, 0.1, 0.1, 0.1], atol=1e-3)
    same = np.full((50, 4), 0.25)
    assert analysis.gate_statistics(same, users)["entropy"]["value"] == pytest.approx(np.log(4))
    assert analysis.gate_against(same, users % 3) == {"value": None, "p": None, "n": 50}


def test_a_personal_gate_is_not():
    users = np.arange(48)
    found = analysis.gate_statistics(np.eye(4)[users % 4], users)
    assert not found["constant"] and found["personal"] == pytest.approx(0.75)
    assert found["entropy"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["leads"] == found["use"] == [0.25] * 4
    assert found["largest_entropy"] == pytest.approx(np.log(4))


def test_a_gate_that_follows_groups_is_told_from_one_that_does_not():
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    random = rng.dirichlet(np.ones(4), size=60)
    follows = 0.5 * random + 0.5 * np.eye(4)[labels]
    assert analysis.gate_against(follows, labels)["p"] < 0.01
    assert analysis.gate_against(np.eye(4)[labels], labels)["value"] == pytest.approx(1)
    independent = analysis.gate_against(random, labels)
    assert independent["p"] > 0.05 and independent["value"] < 0.2
    table = pd.DataFrame(follows).groupby(labels)
    between = (table.size() * ((table.mean() - follows.mean(0)) ** 2).sum(axis=1)).sum()
    expected = between / ((follows - follows.mean(0)) ** 2).sum()
    assert analysis.gate_against(follows, labels)["value"] == pytest.approx(expected)
