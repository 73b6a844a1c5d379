import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ilora.data import Questions, Sequences
from ilora.data.world import titles
from ilora.errors import UserError
from ilora.evaluation import OPEN
from ilora.language import (
    PROMPT,
    LanguageRecommender,
    Prompts,
    adapter_config,
    load_language_model,
    ranking,
    read_answer,
)
from ilora.language import recommender as recommender_module
from ilora.language.ranking import mask_and_positions
from ilora.recommenders import Caser, GRU4Rec, SASRec
from ilora.recommenders.base import k_means
from ilora.training import TrainingArguments, fit

WORDS = " ".join(titles()["title"]).split()
TITLES = [" ".join(WORDS[4 * i : 4 * i + (1, 2, 2, 2, 4)[i % 5]]) for i in range(60)]  # of one to four words
KINDS = {  # name -> encoder?, adapter, and guidance where it is not the sequence
    "text": (False, None),
    "hybrid": (True, None),
    "lora": (True, {"experts": 1}),
    "ilora": (True, {"experts": 4}),
    "convolutional": (True, {"experts": 2, "gate": "convolutional"}),
    "clusters": (True, {"experts": 2, "gate": "clusters"}),
    "random": (True, {"experts": 4}, "random"),
    "token": (True, {"experts": 4}, "token"),
}


def make(kind):
    """A recommender around the embedded model whose adapter, projector and encoder all matter."""
    with_encoder, adapter, *guidance = KINDS[kind]
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    torch.manual_seed(1)
    encoder = SASRec(len(TITLES), window=6) if with_encoder else None
    if encoder:
        torch.nn.init.normal_(encoder.items.weight, std=0.3)
    config = adapter_config(**adapter) if adapter else None
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    model = LanguageRecommender(language_model, prompts, encoder, config, 7, *guidance)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "projector" in name:
                parameter += 0.03 * torch.randn_like(parameter)
            if "W_g" in name:
                parameter *= 5  # experts with clearly different weights
    if kind == "clusters":
        model.language_model.base_model.lora_gate["default"].centres.normal_()
    return model.eval()


@pytest.fixture(scope="module", params=["text", "hybrid", "lora", "ilora"])
def model(request):
    return make(request.param)


def question_rows(lengths=(1, 6, 3, 4), offered=20, seed=0):
    """Questions of different lengths: (history, candidates, target)."""
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        items = rng.permutation(len(TITLES))
        candidates = items[length : length + offered]
        rows.append((items[:length], candidates, int(rng.choice(candidates))))
    return rows


# ---------------------------------------------------------------- an independent reference, one sequence at a time


def padded(model, history):
    window = model.encoder.window
    return torch.tensor([[len(TITLES)] * (window - len(history)) + list(history)])


def reference_logits(model, tokens, history, candidates, hybrid=True):
    """(tokens, vocabulary) of one sequence without padding, mask or positions."""
    weight, items = model.language_model.get_input_embeddings().weight, iter([*history, *candidates])
    embeds = []
    for token in tokens:
        item = next(items) if token == model.prompts.item_token else None
        replaced = hybrid and item is not None
        embeds.append(model.projector(model.encoder.items.weight[item]) if replaced else weight[token])
    gate = {"sequence_embeds": model.encoder.encode(padded(model, history))} if model.gated else {}
    return model.language_model(inputs_embeds=torch.stack(embeds)[None], **gate).logits[0]


def reference_score(model, history, candidates, item, hybrid=True):
    """log P(title of `item` and end | prompt), Eq. 7."""
    tokens = model.prompts.write(history, candidates, hybrid=model.encoder is not None)
    answer = [*model.prompts.answers[item], model.prompts.end]
    logits = reference_logits(model, tokens + answer, history, candidates, hybrid)
    probability = logits.log_softmax(-1)
    return sum(probability[len(tokens) - 1 + place, token] for place, token in enumerate(answer))


# ---------------------------------------------------------------- score


@torch.no_grad()
def test_score_equals_independent_forward_passes(model):
    rows = question_rows()
    scores = model.score(rows)
    assert scores.shape == (4, 20)
    expected = [[reference_score(model, row[0], row[1], item) for item in row[1]] for row in rows]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert scores.std(1).min() > 0.1  # far above the tolerance


def test_score_under_eager_attention_is_the_same(model):
    rows = question_rows()
    expected = model.score(rows)
    inner = model.language_model.get_base_model() if model.gated else model.language_model
    if not hasattr(inner, "set_attn_implementation"):
        inner = inner.get_base_model()
    inner.set_attn_implementation("eager")
    try:
        torch.testing.assert_close(model.score(rows), expected, rtol=1e-4, atol=1e-3)
    finally:
        inner.set_attn_implementation("sdpa")


def test_padding_and_the_order_of_a_batch_change_nothing(model):
    rows = question_rows()
    together = model.score(rows)
    torch.testing.assert_close(model.score(rows[::-1]).flip(0), together, rtol=1e-4, atol=1e-3)
    alone = torch.cat([model.score([row]) for row in rows])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-3)
    answers = model.generate(rows)
    assert model.generate(rows[::-1])[::-1] == answers
    assert [model.generate([row])[0] for row in rows] == answers


def test_a_candidates_score_depends_on_the_question_not_on_the_target(model):
    history, candidates, _ = question_rows()[1]
    first, second = (model.score([(history, candidates, int(target))]) for target in candidates[:2])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    changed = model.score([(history[::-1], candidates, 0)])
    assert (changed - first).abs().max() > 1e-2


# ---------------------------------------------------------------- generate


@torch.no_grad()
def greedy(model, history, candidates):
    """A plain greedy loop without a cache; the text written."""
    tokens = model.prompts.write(history, candidates, hybrid=model.encoder is not None)
    written = []
    for _ in range(1 + max(len(model.prompts.answers[item]) for item in candidates)):
        logits = reference_logits(model, tokens + written, history, candidates)[-1]
        token = int(logits.argmax())
        if token == model.prompts.end:
            break
        written.append(token)
    return model.prompts.tokenizer.decode(written, skip_special_tokens=True)


def test_generate_agrees_with_a_plain_greedy_loop(model, monkeypatch):
    rows = question_rows(lengths=(1, 6, 3, 4, 2, 5))
    expected = [greedy(model, row[0], row[1]) for row in rows]
    columns = [read_answer(text, [TITLES[item] for item in row[1]]) for text, row in zip(expected, rows, strict=True)]
    assert model.generate(rows) == columns
    assert any(column is not None for column in columns)
    monkeypatch.setattr(
        recommender_module, "read_answer", lambda text, offered: text
    )  # the same letters, if invalid too
    assert [text.strip() for text in model.generate(rows)] == [text.strip() for text in expected]


def test_generate_is_greedy_whatever_the_models_defaults_are(model):
    rows, expected = question_rows(), model.generate(question_rows())
    defaults = model.language_model.generation_config
    before, defaults.repetition_penalty = defaults.repetition_penalty, 50.0
    try:
        assert model.generate(rows) == expected
    finally:
        defaults.repetition_penalty = before


# ---------------------------------------------------------------- both at once


def test_answer_is_score_and_generate(model):
    """Open are those whose generated text is no candidate's title, or one that greedy decoding writes otherwise."""
    rows = question_rows(lengths=(1, 6, 3, 4, 2, 5, 6, 1), seed=3)
    scores, written = model.score(rows), model.generate(rows)
    answer_scores, columns = model.answer(rows)
    torch.testing.assert_close(answer_scores, scores, rtol=1e-5, atol=1e-4)
    assert 0 < columns.count(OPEN) < len(rows)
    assert all(column in (OPEN, text) for column, text in zip(columns, written, strict=True))


def test_candidates_of_different_lengths_are_not_padded_to_the_longest(model):
    assert model.packs
    rows, seen = question_rows(), []
    inner = model.language_model.get_base_model() if hasattr(model.language_model, "peft_config") else None
    embedded = (inner or model.language_model).model
    hook = embedded.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.score(rows)
    hook.remove()
    prompt = [len(model.prompts.write(*row[:2], model.encoder is not None)) for row in rows]
    titles = [sum(len(model.prompts.answers[item]) for item in row[1]) for row in rows]
    assert seen == [max(map(sum, zip(prompt, titles, strict=True)))]


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("hybrid", [True, False])
def test_loss_is_the_mean_of_minus_log_likelihood(model, hybrid):
    rows = question_rows()
    batch = model.collate(rows)
    with torch.no_grad():
        loss = model(batch, progress=1.0 if hybrid else 0.0)
        expected = -sum(reference_score(model, *row, hybrid=hybrid) for row in rows) / len(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_loss_of_a_batch_is_the_mean_of_its_rows(model):
    rows = question_rows()
    with torch.no_grad():
        together = model(model.collate(rows))
        alone = torch.stack([model(model.collate([row])) for row in rows]).mean()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_scores_of_a_few_rows_at_once_are_the_same(model, monkeypatch):
    rows = question_rows()
    expected, sizes, one_batch = model.score(rows), [], ranking._scores

    def counted(model, rows, answers):
        sizes.append(len(rows))
        return one_batch(model, rows, answers)

    monkeypatch.setattr(ranking, "_scores", counted)
    monkeypatch.setattr(ranking, "LOGITS", 1)
    torch.testing.assert_close(model.score(rows), expected, rtol=1e-4, atol=1e-3)
    assert set(sizes) == {1}


@pytest.mark.parametrize("multiple", [1, 32])
def test_padding_to_a_multiple_changes_shapes_only(model, multiple, monkeypatch):
    rows = question_rows()
    with torch.no_grad():
        expected, scores = model(model.collate(rows)), model.score(rows)
        monkeypatch.setattr(model.prompts, "pad_to_multiple_of", multiple)
        batch = model.collate(rows)
        assert all(batch[name].shape[1] % multiple == 0 for name in ("input_ids", "part"))
        assert batch["labels"].shape[1] == batch["at"].shape[1] < 32  # only layers are compiled, the loss is not
        torch.testing.assert_close(model(batch), expected)
        torch.testing.assert_close(model.score(rows), scores, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_loss_takes_logits_at_the_answers_only_and_no_mask(model):
    batch, seen = model.collate(question_rows()), []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    logits = model.logits(batch)
    hook.remove()
    assert logits.shape[:2] == batch["labels"].shape  # the longest answer and its end
    assert "attention_mask" not in seen[0] and not seen[0]["use_cache"]


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("kind", ["lora", "ilora", "convolutional"])
def test_only_adapter_gate_and_projector_receive_gradients(kind):
    model = make(kind).train()
    model(model.collate(question_rows()), progress=1.0).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == trained
    assert all("lora_" in name or name.startswith("projector.") for name in trained)
    for part in ("lora_A", "lora_B", "projector", *(["lora_gate"] if kind != "lora" else [])):
        assert any(part in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 7 * 4  # all seven projections of four layers
    assert not any(p.requires_grad for p in model.encoder.parameters())
    grouped = [p for group in model.parameter_groups(0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for n, p in model.named_parameters() if n in trained}
    assert len(grouped) == len(trained)
    decayed = [g for g in model.parameter_groups(0.1) if g["weight_decay"] > 0]
    assert [id(p) for g in decayed for p in g["params"]] == [id(p) for p in model.projector.parameters()]


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_base_and_an_encoder_of_the_users_own_are_frozen_and_training_nothing_is_refused(with_encoder, tmp_path):
    """As `AutoModelForCausalLM.from_pretrained` gives it, every weight of a base is trainable."""
    base, tokenizer = load_language_model("embedded", device="cpu")
    encoder = SASRec(len(TITLES), window=6) if with_encoder else None
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    model = LanguageRecommender(base.requires_grad_(True), prompts, encoder)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(UserError, match=r"no trainable parameter: .*adapter"):
        fit(model, question_rows(), TrainingArguments(1, 4, 1e-2, device="cpu"), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert encoder is None or not encoder.training


def test_text_only_batches_leave_the_projector_without_gradient():
    model = make("lora").train()
    model(model.collate(question_rows()), progress=0.0).backward()
    assert all(p.grad is None for p in model.projector.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_the_curriculum_is_hybrid_with_probability_progress(monkeypatch):
    model, hybrids = make("lora"), []
    batch = model.collate(question_rows(lengths=(2,)))

    def recorded(batch, hybrid):
        hybrids.append(bool(hybrid))
        return torch.zeros(*batch["labels"].shape, 4096)

    monkeypatch.setattr(model, "logits", recorded)
    for progress, low, high in ((0.0, 0, 0), (0.3, 0.26, 0.34), (1.0, 1, 1)):
        hybrids.clear()
        for seed in range(2000):
            model(batch, progress=progress, step_seed=seed)
        assert low <= np.mean(hybrids) <= high
    hybrids.clear()
    for _ in range(20):
        model(batch, progress=0.5, step_seed=7)  # one draw for all micro-batches of a step
    assert len(set(hybrids)) == 1


def test_the_encoder_stays_in_eval_mode():
    model = make("ilora").train()
    assert model.training and model.language_model.training and not model.encoder.training


def test_trainable_state_holds_what_training_changes():
    model = make("convolutional").train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(model.collate(question_rows())).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= set(model.trainable_state())
    assert any("running_mean" in name for name in changed)
    # and nothing of the frozen language model is kept
    assert all("lora_" in name or "projector" in name for name in model.trainable_state())


# ---------------------------------------------------------------- the gate


def test_the_gate_sees_the_encoders_representation_of_the_history():
    model, seen = make("ilora"), []
    assert model.packs
    gate = model.language_model.base_model.lora_gate["default"]
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    rows = question_rows()
    expected = torch.cat([model.encoder.encode(padded(model, row[0])) for row in rows])
    model(model.collate(rows))
    model.score(rows)
    model.generate(rows)
    assert len(seen) > 3
    for z, _ in seen[:3]:
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    for z, _ in seen[3:]:  # of the rows that are still written
        assert (z[:, None] - expected).abs().amax(-1).amin(1).max() < 1e-5
    weights = seen[0][1]
    torch.testing.assert_close(weights, (expected @ gate.W_g.weight.T).softmax(-1), rtol=1e-5, atol=1e-5)
    assert weights.std(0).max() > 0.05  # different users get different experts
    torch.testing.assert_close(model.gate_weights(rows), weights.detach(), rtol=1e-5, atol=1e-5)


def test_lora_is_one_expert_of_weight_one():
    assert make("lora").gate_weights(question_rows()).tolist() == [[1.0]] * 4


def test_a_history_beyond_the_window_is_cut_at_its_old_end():
    model = make("ilora")
    history, candidates, target = question_rows(lengths=(9,))[0]
    batch = model.collate([(history, candidates, target)])
    assert batch["history"].tolist() == [list(history[-6:])]


def representations(model, rows, answers=False):
    return model.guide(model.batch(rows, [[row[2]] for row in rows] if answers else ()))


def test_random_guidance_is_fixed_by_seed_and_history():
    model, rows = make("random"), question_rows()
    z = representations(model, rows)
    assert z.shape == (4, 64) and len(z.unique()) == z.numel()
    assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.2
    others = [
        (history, offered[::-1], target) for history, offered, target in rows
    ]  # other candidates, as in another epoch
    assert torch.equal(representations(model, others[::-1], answers=True).flip(0), z)
    assert torch.equal(representations(make("random"), rows), z)
    model.encoder.items.weight.data.zero_()
    assert torch.equal(representations(model, rows), z)
    history = rows[1][0]
    assert not torch.equal(representations(model, [(history[::-1], *rows[1][1:])])[0], z[1])
    model.seed += 1
    assert not torch.isclose(representations(model, rows), z).any()


def test_token_guidance_is_the_mean_of_the_prompts_token_embeddings():
    model, rows = make("token"), question_rows()
    z = representations(model, rows)
    table, projection = model.language_model.get_input_embeddings().weight, torch.randn(
        model.language_model.config.hidden_size, 64, generator=torch.Generator().manual_seed(7)
    )  # fmt: skip
    for row, vector in zip(rows, z, strict=True):
        tokens = model.prompts.write(*row[:2], hybrid=True)
        mean = table[torch.tensor(tokens)].mean(0) @ projection
        torch.testing.assert_close(vector, (mean - mean.mean()) / mean.std(correction=0), rtol=1e-4, atol=1e-4)
    assert (z[0] - z[1]).abs().max() > 1e-2
    torch.testing.assert_close(representations(model, rows, answers=True), z)  # answers are not read
    assert (model.gate_weights(rows).std(0) > 0).all()


@pytest.mark.parametrize("kind", ["random", "token"])
def test_ranking_and_loss_have_the_prompts_guidance(kind, monkeypatch):
    """The gate gets no candidates after the prompt, no padding and no other rows."""
    model, rows, seen = make(kind), question_rows(), []
    assert model.packs
    gate = model.language_model.base_model.lora_gate["default"]
    gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    together = model.score(rows)
    torch.testing.assert_close(torch.cat([model.score([row]) for row in rows]), together, rtol=1e-4, atol=1e-3)
    model(model.collate(rows))
    model.generate(rows)
    for z in (torch.cat(seen[1:5]), *seen[5:7]):
        torch.testing.assert_close(z, seen[0])
    assert len(seen) > 7
    for z in seen[7:]:  # of the rows that are still written
        assert (z[:, None] - seen[0]).abs().amax(-1).amin(1).max() < 1e-5
    assert (model.score([rows[0]]) - make("ilora").score([rows[0]])).abs().max() > 1e-3  # and it has an effect


def test_an_unknown_guidance_is_refused():
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    with pytest.raises(UserError, match="choose one of sequence, random, token"):
        LanguageRecommender(language_model, Prompts(tokenizer, TITLES, "story", "read"), guidance="nothing")


@pytest.mark.parametrize("n_items", [len(TITLES) - 1, len(TITLES) + 1])
def test_an_encoder_of_another_data_set_is_refused(n_items):
    """Its embeddings and its padding would stand for other items: with more items, nothing else would fail."""
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    with pytest.raises(UserError, match=f"encoder is of {n_items} items, not {len(TITLES)}"):
        LanguageRecommender(language_model, prompts, SASRec(n_items), adapter_config(experts=4))


def test_ilora_without_an_encoder_is_refused():
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    with pytest.raises(UserError, match="give an encoder"):
        LanguageRecommender(
            language_model, Prompts(tokenizer, TITLES, "story", "read"), None, adapter_config(experts=4)
        )


@pytest.mark.parametrize("kind", [GRU4Rec, Caser])
def test_any_sequence_model_may_be_the_encoder(tmp_path, kind):
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    torch.manual_seed(1)
    encoder, rows = kind(len(TITLES), window=6), question_rows(lengths=(1, 6, 9), offered=4)
    torch.nn.init.normal_(encoder.items.weight, std=0.3)
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    model = LanguageRecommender(language_model, prompts, encoder, adapter_config(experts=4), seed=7).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "projector" in name:
                parameter += 0.03 * torch.randn_like(parameter)
    every = model.score(rows)
    for row, scores in zip(rows[:2], every, strict=False):
        expected = torch.stack([reference_score(model, row[0], row[1], item) for item in row[1]])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
    model.save_pretrained(tmp_path / "kept", base_model="embedded")
    again = LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")
    assert type(again.encoder) is kind
    torch.testing.assert_close(again.score(rows), every, rtol=1e-5, atol=1e-4)


def test_a_fresh_adapter_answers_as_the_language_model_does():
    language_model, tokenizer = load_language_model("embedded", device="cpu")
    prompts, rows = Prompts(tokenizer, TITLES, "story", "read"), question_rows()
    torch.manual_seed(0)
    encoder = SASRec(len(TITLES), window=6)
    plain = LanguageRecommender(language_model, prompts, encoder).eval()
    expected = plain.score(rows)
    adapted = LanguageRecommender(language_model, prompts, encoder, adapter_config(experts=4)).eval()
    adapted.projector.load_state_dict(plain.projector.state_dict())
    torch.testing.assert_close(adapted.score(rows), expected, rtol=1e-5, atol=1e-4)


def test_the_seed_decides_the_start():
    def start(seed):
        language_model, tokenizer = load_language_model("embedded", device="cpu")
        prompts = Prompts(tokenizer, TITLES, "story", "read")
        torch.manual_seed(0)
        encoder = SASRec(len(TITLES), window=6)
        model = LanguageRecommender(language_model, prompts, encoder, adapter_config(experts=4), seed=seed)
        return model.trainable_state()

    one, again, other = start(3), start(3), start(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_B" not in name and "bias" not in name)


# ---------------------------------------------------------------- masks


def test_each_title_is_read_directly_after_the_prompt_and_sees_no_other_title():
    model, rows = make("lora"), question_rows(lengths=(1, 6), offered=3)
    batch = model.batch(rows, [row[1] for row in rows])
    inputs = mask_and_positions(batch["part"], model.language_model.config, torch.float32)
    mask = inputs["attention_mask"]
    assert mask.shape == (2, 1, *2 * batch["part"].shape[1:])
    assert mask.unique().tolist() == [torch.finfo(torch.float32).min, 0]
    assert (mask == 0).any(-1).all()  # a softmax over nothing has NaN gradients in CUDA's kernels
    for part, sees in zip(batch["part"].tolist(), mask[:, 0] == 0, strict=True):
        for query, key in itertools.product(range(len(part)), repeat=2):
            assert sees[query, key] == (key <= query and part[key] in (PROMPT, part[query]))
    for row, part, positions in zip(rows, batch["part"].tolist(), inputs["position_ids"].tolist(), strict=True):
        prompt = model.length(row)
        titles = [[prompt + place for place in range(len(model.prompts.answers[item]))] for item in row[1]]
        expected = [*range(prompt), *itertools.chain(*titles)]
        assert positions == expected + [0] * (len(part) - len(expected))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_in_bf16_autocast_gives_finite_gradients(attention):
    model = make("ilora").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1  # as large as training makes it; a wild adapter multiplies rounding
    model.language_model.get_base_model().set_attn_implementation(attention)
    batch = model.collate(question_rows())
    exact = model(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    loss.backward()
    assert abs(loss.item() - exact) < 0.03 * exact
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_recommender_gives_identical_answers(kind, tmp_path):
    model, rows = make(kind), question_rows()
    model.save_pretrained(tmp_path / "kept", base_model="embedded")
    again = LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")
    torch.testing.assert_close(again.score(rows), model.score(rows), rtol=0, atol=0)
    assert again.generate(rows) == model.generate(rows)
    assert again.gated == model.gated and not again.training
    assert not list((tmp_path / "kept").rglob("*.bin")) and not list((tmp_path / "kept").rglob("*.p*[kt]"))
    assert sum(file.stat().st_size for file in (tmp_path / "kept").rglob("*")) < 3_000_000  # not the base


@pytest.mark.parametrize("kind", ["text", "ilora"])
def test_a_saved_recommender_knows_where_its_base_was_loaded(kind, tmp_path):
    model, rows = make(kind), question_rows()
    model.save_pretrained(tmp_path / "kept")
    again = LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")
    torch.testing.assert_close(again.score(rows), model.score(rows), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["recommender.json", "projector.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("left", [None, 100])
def test_a_damaged_or_missing_file_is_refused(name, left, tmp_path):
    make("ilora").save_pretrained(tmp_path / "kept")
    file = tmp_path / "kept" / name
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[:left])
    with pytest.raises(UserError, match=f"{tmp_path / 'kept'}.* name "):
        LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")


@pytest.mark.parametrize("name", ["adapter", "encoder"])
def test_a_copy_without_one_of_its_folders_is_refused(name, tmp_path):
    """Without adapter/ the base alone would answer."""
    make("ilora").save_pretrained(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / name)
    with pytest.raises(UserError, match=f"{name}'.*: name a folder that save_pretrained wrote"):
        LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="save_pretrained"):
        LanguageRecommender.from_pretrained(tmp_path, device="cpu")


# ---------------------------------------------------------------- questions


def windows():
    rng = np.random.default_rng(0)
    history = np.stack([rng.permutation(len(TITLES))[:6] for _ in range(30)])
    length = rng.integers(3, 7, size=30)
    history[np.arange(6)[None] < 6 - length[:, None]] = len(TITLES)
    target = np.array([rng.choice(np.setdiff1d(np.arange(len(TITLES)), row)) for row in history])
    return Sequences(np.arange(30), length, history, length, target)


def test_a_question_is_a_padded_history_candidates_and_target():
    sequences = windows()
    questions = Questions(sequences, len(TITLES), seed=5)
    assert len(questions) == 30
    for row in range(30):
        history, candidates, target = questions[row]
        assert list(history) == list(sequences.history[row])
        assert target == sequences.target[row] and list(candidates).count(target) == 1
        assert len(set(candidates)) == 20 and not set(candidates) & set(history)


@pytest.mark.parametrize("gate_per_layer", [False, True])
def test_k_means_of_the_states_places_the_centres_of_a_gate(gate_per_layer, monkeypatch):
    shape = {"experts": 2, "gate": "clusters", "gate_per_layer": gate_per_layer}
    monkeypatch.setitem(KINDS, "placed", (True, shape))
    model, sequences, calls = make("placed"), windows(), []
    monkeypatch.setattr(recommender_module, "k_means", lambda *given: calls.append(given) or k_means(*given))
    questions = Questions(sequences, len(TITLES), seed=5)
    model.fit_gate(questions)
    assert len(calls) == 1  # however many layers have a gate
    z = model.encoder.encode(torch.from_numpy(sequences.history)).detach().numpy()
    labels, _ = k_means(z, 2, model.seed, sequences.user)
    weights = model.gate_weights([questions[row] for row in range(30)]).view(-1, 30, 2)
    np.testing.assert_array_equal(weights, np.broadcast_to(np.eye(2)[labels], weights.shape))
    alone = Questions(replace(sequences, user=np.zeros(30, int)), len(TITLES), seed=5)
    with pytest.raises(UserError, match="2 clusters"):
        model.fit_gate(alone)


def test_a_prompt_leaves_out_padding():
    prompts, sequences = make("text").prompts, windows()
    row = int(sequences.length.argmin())  # with the most padding
    history, candidates, _ = Questions(sequences, len(TITLES), seed=5)[row]
    known = history[history < len(TITLES)]
    assert 0 < len(known) < len(history)
    assert prompts.write(history, candidates, True) == prompts.write(known, candidates, True)
    batches = [prompts.batch([items], [candidates]) for items in (history, known)]
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


def test_epochs_draw_other_candidates_and_epoch_0_those_of_the_seed():
    questions = Questions(windows(), len(TITLES), seed=5)
    drawn = [questions.candidates.copy()]
    for epoch in (1, 2, 0):
        questions.set_epoch(epoch)
        drawn.append(questions.candidates.copy())
    np.testing.assert_array_equal(drawn[0], drawn[3])
    for one, other in itertools.combinations(drawn[:3], 2):
        assert (one != other).any(1).all()


def test_some_of_the_questions_are_the_same_questions():
    questions = Questions(windows(), len(TITLES), seed=5)
    for epoch in (0, 3):
        questions.set_epoch(epoch)
        some = questions.take(np.array([7, 2]))
        for one, other in zip((some[0], some[1]), (questions[7], questions[2]), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    some.set_epoch(0)
    questions.set_epoch(0)
    np.testing.assert_array_equal(some.candidates, questions.candidates[[7, 2]])


@pytest.mark.parametrize("kind", ["lora", "ilora"])
@pytest.mark.slow
def test_compiled_layers_train_alike_and_only_in_training(tmp_path, monkeypatch, kind):
    """One compilation serves all layers and later steps, hybrid and text-only ones."""
    compiled = []

    def backend(graph, inputs, **_):
        compiled.append(len(inputs))
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **options: original(layer, backend=backend, **options))
    monkeypatch.setitem(KINDS, kind, (True, KINDS[kind][1] | {"dropout": 0.0}))
    losses = []
    for choice in ("no", "yes"):
        torch._dynamo.reset()
        model, train = make(kind), question_rows(lengths=(6,) * 24)
        arguments = TrainingArguments(3, 8, 1e-3, device="cpu", compile=choice)
        losses.append(fit(model, train, arguments, tmp_path / choice)["loss"])
        before = len(compiled)
        model.score(train[:3])
        model(model.collate(train[:3]))
        assert len(compiled) == before
        assert not any("_orig_mod" in name for name in model.state_dict())
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert 1 <= len(compiled) <= 2  # at most two lengths, padded to 64
