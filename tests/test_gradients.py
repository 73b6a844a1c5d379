"""Gradients of groups against a backward pass per sequence; clusters of known points."""

import gc

import numpy as np
import pytest
import torch

from ilora.data import Questions, Sequences
from ilora.data.world import titles
from ilora.errors import UserError
from ilora.language import LanguageRecommender, Prompts, adapter_config, load_language_model
from ilora.recommenders import SASRec
from ilora.study import gradients, similarity
from ilora.training import TrainingArguments, fit, load_snapshot

pytestmark = pytest.mark.book

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
    model, rows = make(ADAPTERS[kind], dropout=0.2), questions()
    model.train()  # dropout is left out all the same
    result = gradients.group_gradients(model, rows, LABELS, batch_size)
    gates = [] if kind == "LoRA" else ["gate"]
    assert list(result) == [*PROJECTIONS, *gates]
    model.eval()
    expected = {name: torch.zeros(3, part.shape[1], dtype=torch.float64) for name, part in result.items()}
    for row, label in enumerate(LABELS):
        model.zero_grad()
        model(model.collate([rows[row]]), progress=1.0).backward()
        for name in result:
            parameters = [
                p for n, p in model.named_parameters() if p.requires_grad and f"{name}." in n and "lora_gate" not in n
            ]
            if name == "gate":
                parameters = [p for n, p in model.named_parameters() if "lora_gate" in n]
            expected[name][label] += torch.cat([parameter.grad.flatten() for parameter in parameters])
    for name, part in result.items():
        torch.testing.assert_close(part, expected[name], rtol=1e-9, atol=1e-12)
        assert part.norm(dim=1).min() > 1e-3  # far above the tolerance


def test_gradients_leave_the_model_as_it_was():
    model, rows = make(ADAPTERS["iLoRA"]), questions()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients.group_gradients(model, rows, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_experts_keep_sequences_apart():
    """Sequences that a gate sends to different experts alone have orthogonal gradients of A and B."""
    model, rows = make(ADAPTERS["iLoRA"]), questions(2)
    z = torch.from_numpy(gradients.representations(model.encoder, rows.sequences.history))
    gate = next(p for name, p in model.named_parameters() if "W_g" in name)
    with torch.no_grad():
        gate.zero_()
        gate[:2] = 50 * torch.linalg.pinv(z).T  # the first sequence to expert 0, the second to expert 1
    weights = model.gate_weights(list(rows))
    torch.testing.assert_close(weights[:, :2], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    cosines = similarity.cosines(gradients.inner_products(gradients.group_gradients(model, rows, np.arange(2))))
    assert abs(cosines["all"][0, 1]) < 1e-9
    with torch.no_grad():
        gate.zero_()
    cosines = similarity.cosines(gradients.inner_products(gradients.group_gradients(model, rows, np.arange(2))))
    assert abs(cosines["all"][0, 1]) > 1e-3


def test_while_b_is_zero_only_b_has_a_gradient():
    model, rows = make(ADAPTERS["LoRA"]), questions()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    result = gradients.group_gradients(model, rows, LABELS)
    of_b = [p.numel() for n, p in model.named_parameters() if "q_proj.lora_B" in n]
    assert (result["q_proj"] != 0).sum() <= 3 * sum(of_b) < result["q_proj"].numel()
    assert np.isfinite(similarity.cosines(gradients.inner_products(result))["all"]).all()


def test_memory_grows_with_groups_and_not_with_sequences(monkeypatch, request):
    """Bytes of tensors before a batch: of 9 and 18 sequences in three groups, then of 18 in six groups."""
    model, held = make(ADAPTERS["iLoRA"]), []
    loss = gradients.summed_loss

    def tensors():  # compilation by other tests leaves subclasses, which have no size
        return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]

    gc.collect()
    gc.freeze()  # gc no longer lists what is there already
    request.addfinalizer(gc.unfreeze)

    def watched(model, rows):
        held[-1].append(sum(thing.nbytes for thing in tensors()))
        return loss(model, rows)

    monkeypatch.setattr(gradients, "summed_loss", watched)
    for n, groups in ((9, 3), (18, 3), (18, 6)):
        held.append([])
        gc.collect()
        result = gradients.group_gradients(model, questions(n), np.arange(n) % groups, batch_size=3)
        vector = sum(part[0].nbytes for part in result.values())
        del result
        assert len(held[-1]) == n // 3 // groups * groups
    of_nine, *others, six_groups = (
        max(values[1:]) for values in held
    )  # the first loss is computed before any gradient
    assert others == [of_nine]
    assert six_groups - of_nine == 3 * vector


@pytest.mark.parametrize("labels", [LABELS[:-1], np.where(LABELS == 1, 0, LABELS), LABELS - 1])
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        gradients.group_gradients(make(ADAPTERS["LoRA"]), questions(), labels)


def test_a_model_without_adapter_is_refused():
    with pytest.raises(UserError, match="no adapter"):
        gradients.group_gradients(make(None), questions(), LABELS)


def test_products_along_are_those_of_the_kept_states(tmp_path):
    model, rows = make(ADAPTERS["iLoRA"], dtype=torch.float32), questions()
    arguments = TrainingArguments(epochs=2, batch_size=4, learning_rate=0.05, snapshots=2, device="cpu")
    fit(model, rows, arguments, tmp_path)
    kept = sorted((tmp_path / "snapshots").iterdir())
    rows.set_epoch(0)
    with torch.no_grad():  # not a state of training, to see that it comes back
        for value in model.trainable_state().values():
            value *= 1.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = gradients.products_over_training(model, kept, rows, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for place, path in enumerate(kept):
        load_snapshot(model, path)
        expected = gradients.inner_products(gradients.group_gradients(model, rows, LABELS))
        for kind, part in expected.items():
            np.testing.assert_allclose(result[kind][place], part, rtol=1e-5)
    assert not np.allclose(result["q_proj"][0], result["q_proj"][1], rtol=0.01)


# ---------------------------------------------------------------- clusters


def blobs(n=40, seed=0):
    """Eight clouds along a curve, in mixed order; the place on the curve of each point."""
    rng = np.random.default_rng(seed)
    place = rng.permutation(np.repeat(np.arange(8), n // 8))
    return np.stack([3.0 * place, 0.3 * place**2], axis=1) + 0.05 * rng.normal(size=(n, 2)), place


def test_similar_clusters_have_similar_numbers():
    z, place = blobs()
    labels, centres = gradients.clusters(z)
    assert all(len(set(labels[place == p])) == 1 for p in range(8)) and len(set(labels)) == 8
    np.testing.assert_allclose(centres, [z[labels == label].mean(0) for label in range(8)])
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    mixed = np.linalg.norm(np.diff(centres[[0, 4, 1, 5, 2, 6, 3, 7]], axis=0), axis=1)
    assert steps.sum() < mixed.sum()
    along = np.array([place[labels == label][0] for label in range(8)])
    assert np.abs(np.diff(along)).max() <= 4
    again, _ = gradients.clusters(z)
    np.testing.assert_array_equal(again, labels)


def test_too_few_distinct_sequences_are_refused():
    with pytest.raises(UserError, match="8 clusters"):
        gradients.clusters(np.repeat(np.eye(4), 10, axis=0))


def test_a_cluster_of_a_single_user_is_refused():
    z, place = blobs()
    gradients.clusters(z, users=np.arange(len(z)))
    with pytest.raises(UserError, match="8 clusters"):
        gradients.clusters(z, users=place)


def test_representations_do_not_depend_on_the_batch():
    encoder, rows = SASRec(60, window=6).eval(), questions()
    result = gradients.representations(encoder, rows.sequences.history, batch_size=4)
    assert result.shape == (len(LABELS), 64)
    with torch.no_grad():
        expected = encoder.encode(torch.from_numpy(rows.sequences.history)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_a_users_sequences_fall_into_one_half():
    rng = np.random.default_rng(0)
    labels, users = rng.integers(3, size=600), rng.integers(60, size=600)
    cut = gradients.halves(labels, users, seed=1)
    np.testing.assert_array_equal(cut // 2, labels)
    of = {}
    for label, user, half in zip(labels, users, cut, strict=True):
        assert of.setdefault((label, user), half) == half
    assert np.ptp(np.bincount(cut).reshape(3, 2), axis=1).max() <= np.bincount(users).max()
    assert (cut != gradients.halves(labels, users, seed=2)).any()
