"""Training with recorded passes: the same results as without, for LoRA and both kinds of gates."""

import copy
import logging
from functools import partial

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ilora.language import adapter_config
from ilora.language.adapted_layers import adapted
from ilora.language.graphs import record_passes

ADAPTERS = {"LoRA": {}, "iLoRA": {"experts": 4}, "gate per layer": {"experts": 4, "gate_per_layer": True}}


def make_model(device="cpu", **adapter):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **shape)).eval().requires_grad_(False)
    model = adapted(base, adapter_config(dropout=0.0, **adapter)).to(device).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model, rows=3, tokens=7, seed=0):
    random = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, tokens, 32, generator=random).to(model.device).requires_grad_()
    z = torch.randn(rows, 64, generator=random).to(model.device)
    return {"inputs_embeds": embeds} | ({"sequence_embeds": z} if hasattr(model.base_model, "conditioning") else {})


def step(model, seeds=(0, 1)):
    """Logits of each micro-batch, and the gradients that all of them have added up."""
    model.zero_grad()
    logits = []
    for seed in seeds:
        logits.append(model(**inputs(model, seed=seed), use_cache=False).logits)
        logits[-1].square().mean().backward()
        logits[-1] = logits[-1].detach().clone()
    return logits + [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def recorded(monkeypatch):
    """The shapes that are recorded; on a CPU a recorded pass is simply the pass."""
    shapes = []

    def make_graphed_callables(passes, sample, **_):
        shapes.append([tuple(value.shape) for value in sample])
        return passes

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return shapes


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_recorded_passes_train_as_the_decoder_does(recorded, adapter):
    model = make_model(**adapter)
    expected = step(model)
    record_passes(model)
    for _ in range(2):
        torch.testing.assert_close(step(model), expected)
    assert len(recorded) == 1 and recorded[0][0] == (3, 7, 32)
    model(**inputs(model, rows=2), use_cache=False)
    assert [shapes[0] for shapes in recorded] == [(3, 7, 32), (2, 7, 32)]


def test_no_pass_is_replayed_over_one_that_still_needs_its_memory(monkeypatch):
    """Two passes before their gradients, as a loss over pairs has; one whose loss is thrown away needs nothing."""
    replays = []

    class Replay(torch.autograd.Function):
        """A pass whose memory the next one overwrites."""

        @staticmethod
        def forward(ctx, embeds):
            ctx.number = len(replays)
            replays.append(ctx.number)
            return embeds.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert ctx.number == replays[-1]
            return gradient

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: Replay.apply)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = make_model()
    record_passes(model)
    first, second, thrown, last = (partial(model, **inputs(model, seed=seed), use_cache=False) for seed in range(4))
    (first().logits + second().logits).sum().backward()
    assert replays == [0]
    thrown()
    last().logits.sum().backward()
    assert replays == [0, 1, 2]


@pytest.mark.parametrize("adapter", list(ADAPTERS.values())[1:], ids=list(ADAPTERS)[1:])
def test_gates_are_applied_before_what_is_recorded(recorded, adapter, monkeypatch):
    """A capture fails where it uses a parameter that a pass outside of it has used, as the gates of layers are."""
    reached = []

    def make_graphed_callables(passes, sample, **_):
        gates = [parameter for name, parameter in passes.named_parameters() if "lora_gate" in name]
        reached.extend(torch.autograd.grad(passes(*sample).sum(), [sample[0], *gates], allow_unused=True)[1:])
        return passes

    model = make_model(**adapter)
    record_passes(model)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    step(model)
    assert len(reached) == 14 * ("gate_per_layer" in adapter) and set(reached) <= {None}


def test_only_training_without_a_mask_is_recorded(recorded):
    model = make_model(experts=4)
    record_passes(model)
    mask = torch.ones(3, 7, dtype=torch.long)
    model(**inputs(model), attention_mask=mask, use_cache=False)
    with torch.no_grad():
        model(**inputs(model), use_cache=False)
    model.eval()(**inputs(model), use_cache=False)
    assert not recorded


def test_passes_are_replayed_only_with_the_adapters_that_were_recorded(monkeypatch):
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    decoder = model.get_base_model().get_decoder()
    first = decoder(**inputs(model)).last_hidden_state
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: lambda embeds: 0 * embeds)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    record_passes(model)
    assert not decoder(**inputs(model)).last_hidden_state.any()
    model.set_adapter("other")
    other = decoder(**inputs(model)).last_hidden_state
    assert other.any() and not torch.allclose(other, first)
    model.set_adapter("default")
    with model.disable_adapter():
        without = decoder(**inputs(model)).last_hidden_state
    assert without.any() and not torch.allclose(without, first)
    model.merge_adapter()
    torch.testing.assert_close(decoder(**inputs(model)).last_hidden_state, first)
    model.unmerge_adapter()
    assert not decoder(**inputs(model)).last_hidden_state.any()


def test_what_ends_recording_leaves_the_model_as_it_was(recorded):
    """A copy of a model that is still recorded would run the decoder of the original."""
    model = make_model(experts=4)
    expected, hooks = step(model), [parameter._backward_hooks for parameter in model.parameters()]
    end = record_passes(model)
    step(model)
    end()
    assert [parameter._backward_hooks or None for parameter in model.parameters()] == hooks
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.get_base_model().get_decoder().norm.weight)
    assert not twin(**inputs(twin), use_cache=False).logits.any()
    torch.testing.assert_close(step(model), expected)
    assert len(recorded) == 1


def test_a_decoder_with_router_logits_is_recorded(recorded):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=2, **shape)
    model = adapted(MixtralForCausalLM(config).requires_grad_(False), adapter_config(dropout=0.0)).train()
    expected = model(**inputs(model), use_cache=False).logits
    record_passes(model)
    torch.testing.assert_close(model(**inputs(model), use_cache=False).logits, expected)
    assert recorded


def test_recording_changes_no_random_numbers(recorded, monkeypatch):
    model = make_model()
    record_passes(model)
    capture = torch.cuda.make_graphed_callables
    warmed = lambda passes, sample, **more: (torch.rand(3), capture(passes, sample, **more))[1]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warmed)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step(model)
    assert torch.equal(torch.rand(3), expected) and recorded


def test_what_cannot_be_recorded_runs_as_before(recorded, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = make_model(experts=4)
    expected = step(model)
    record_passes(model)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(step(model), expected)
    assert [record.getMessage().count("slower") for record in caplog.records] == [1]


def test_too_little_memory_is_an_error(recorded, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make_model()
    record_passes(model)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        step(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are not tested")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_graphs_on_a_gpu_add_up_the_gradients_of_micro_batches(adapter):
    model = make_model("cuda", **adapter)
    plain = copy.deepcopy(model)
    record_passes(model)
    for _ in range(3):
        torch.testing.assert_close(step(model), step(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are not tested")
def test_graphs_on_a_gpu_add_up_the_gradients_of_passes_that_wait():
    models = make_model("cuda", experts=4), make_model("cuda", experts=4)
    record_passes(models[0])
    gradients = []
    for model in models:
        step(model)
        model.zero_grad()
        sum(model(**inputs(model, seed=seed), use_cache=False).logits.square().mean() for seed in (2, 3)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
