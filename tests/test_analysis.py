import gc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.cluster.hierarchy import linkage

from ilora import analysis, runs, similarity
from ilora.data import Sequences
from ilora.language_model import load_language_model
from ilora.model import LanguageRecommender, Questions, adapter_config
from ilora.prompts import Prompts
from ilora.recommenders import SASRec
from ilora.training import TrainingArguments, fit, load_snapshot
from ilora.world import titles

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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
    assert list(found) == [*PROJECTIONS, *gates]
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
    assert len(found) == len(PROJECTIONS) + len(gates)


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
    cosines = similarity.cosines(analysis.products(analysis.gradients(model, asked, np.arange(2))))
    assert abs(cosines["all"][0, 1]) < 1e-9
    with torch.no_grad():
        gate.zero_()
    cosines = similarity.cosines(analysis.products(analysis.gradients(model, asked, np.arange(2))))
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
    assert np.isfinite(similarity.cosines(analysis.products(found))["all"]).all()


def test_memory_grows_with_groups_and_not_with_sequences(monkeypatch):
    """Bytes of tensors before a batch: of 9, 18 and 36 sequences in three groups, then of 36 in six groups."""
    model, held = make(ADAPTERS["iLoRA"]), []
    loss = analysis._loss

    def tensors():  # compilation by other tests leaves kinds of its own, which have no size
        return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]

    gc.collect()
    before = {id(thing) for thing in tensors()}

    def watched(model, rows):
        held[-1].append(sum(thing.nbytes for thing in tensors() if id(thing) not in before))
        return loss(model, rows)

    monkeypatch.setattr(analysis, "_loss", watched)
    for n, groups in ((9, 3), (18, 3), (36, 3), (36, 6)):
        held.append([])
        gc.collect()
        found = analysis.gradients(model, questions(n), np.arange(n) % groups, batch_size=3)
        vector = sum(part[0].nbytes for part in found.values())
        del found
        assert len(held[-1]) == n // 3 // groups * groups
    of_nine, *others, six_groups = (max(values[1:]) for values in held)  # the first loss has no gradients beside it
    assert others == [of_nine, of_nine]
    assert six_groups - of_nine == 3 * vector


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


def test_a_cluster_of_a_single_user_is_refused():
    z, place = blobs()
    analysis.clusters(z, users=np.arange(len(z)))
    with pytest.raises(runs.UserError, match="8 clusters"):
        analysis.clusters(z, users=place)


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


def test_gates_per_layer_are_averaged_over_layers_and_used_by_each():
    users = np.arange(48)
    personal, same = np.eye(4)[users % 4], np.full((48, 4), 0.25)
    found = analysis.gate_statistics(np.stack([personal, same]), users)
    alone = [analysis.gate_statistics(weights, users) for weights in (personal, same)]
    for name in ("personal", "largest_entropy"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in alone]))
    assert found["entropy"]["value"] == pytest.approx(np.log(4) / 2) and found["entropy"]["n"] == 48
    for name in ("use", "leads"):
        assert found[name] == [one[name] for one in alone]


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
