"""The adapter's identities (Eq. 9-12), its gates, and its life inside PEFT, on tiny random models."""

import copy
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Trainer,
    TrainingArguments,
)

import ilora
from ilora.adapter import ILoraConfig, conditioning, export_lora, gate_weights
from ilora.errors import UserError

D, K, R, ALPHA = 6, 4, 8, 32  # gate_dim, experts, rank, alpha
VOCABULARY, BATCH = 50, 3
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, VOCABULARY)

    def forward(self, x):
        return self.second(self.first(x).relu())


def llama():
    config = LlamaConfig(**SMALL, **HEADS, intermediate_size=64, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def gpt2():
    return AutoModelForCausalLM.from_config(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4))


def opt():
    config = OPTConfig(**SMALL, **HEADS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config)


ARCHITECTURES = {
    "perceptron": (Perceptron, ["first", "second"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),  # transposed weights (Conv1D)
    "llama": (llama, SEVEN),
    "opt": (opt, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}


def base(architecture="llama", dtype=torch.float64):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture][0]().to(dtype).eval()


def config(architecture="llama", **options):
    given = {
        "r": R, "lora_alpha": ALPHA, "target_modules": ARCHITECTURES[architecture][1], "num_experts": K,
        "gate_dim": D, "init_lora_weights": False,
        "task_type": None if architecture == "perceptron" else "CAUSAL_LM",
    }  # fmt: skip
    return ILoraConfig(**{**given, **options})


def adapted(architecture="llama", dtype=torch.float64, **options):
    """A model with random A and B: nothing is zero, so every identity has something to fail on."""
    model = base(architecture, dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config(architecture, **options)).eval()


def plain_lora(dtype=torch.float64, r=R, alpha=ALPHA, **options):
    given = {"r": r, "lora_alpha": alpha, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
    lora, model = LoraConfig(**{**given, "init_lora_weights": False, **options}), base(dtype=dtype)
    torch.manual_seed(1)  # the same A and B as in `adapted` with a shared gate
    return get_peft_model(model, lora).eval()


def tokens(rows=BATCH, length=7, seed=2):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def users(rows=BATCH, seed=3, dtype=torch.float64):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(architecture="llama", rows=BATCH):
    if architecture == "perceptron":
        return torch.randn(rows, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tokens(rows)


def outputs(model, *args, **kwargs):
    with torch.no_grad():
        result = model(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.logits


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(model, z, ids=None, **kwargs):
    ids = tokens() if ids is None else ids
    model.zero_grad()
    model(ids, labels=ids, sequence_embeds=z, **kwargs).loss.backward()
    return gradients_of(model)


def in_threads(functions):
    """Run the functions at the same time, each in its thread."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def eq_12(layer, x, w):
    """An adapted layer's output, expert by expert, with the released code's scale alpha / (r / K)."""
    A, B = layer.lora_A["default"].weight.chunk(K), layer.lora_B["default"].weight.chunk(K, dim=1)
    experts = (x @ A_k.T @ B_k.T * w_k.view(-1, *[1] * (x.dim() - 1)) for A_k, B_k, w_k in zip(A, B, w.T, strict=True))
    return layer.base_layer(x) + ALPHA / (R / K) * sum(experts)


def assert_close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_gradients(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def make_uniform(model):
    """Zero gate logits: w = 1 / K."""
    for parameter in model.base_model.lora_gate.parameters():
        nn.init.zeros_(parameter)


# ---- identities


@pytest.mark.parametrize("architecture", ["perceptron", "gpt2", "llama"])
def test_layer_is_the_sum_over_experts(architecture):
    model, z = adapted(architecture), users()
    w = gate_weights(model, z)
    assert torch.equal(w, (z @ model.base_model.lora_gate["default"].W_g.weight.T).softmax(-1))  # Eq. 11
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert layers
    for layer in layers:
        x = torch.randn(BATCH, 5, layer.in_features, dtype=torch.float64)
        with model.sequence_embeds(z):
            assert_close(layer(x), eq_12(layer, x, w))


@pytest.mark.parametrize(
    "options", [{"num_experts": K}, {"num_experts": 1}, {"num_experts": 1, "gate_per_layer": True}]
)
def test_uniform_gate_and_one_expert_are_lora(options):
    """Bit for bit: logits, logits and gradients under the same dropout."""
    ours, lora = adapted(**options, lora_dropout=0.2), plain_lora(lora_dropout=0.2)
    assert not ours.load_state_dict(lora.state_dict(), strict=False).unexpected_keys
    make_uniform(ours)
    assert torch.equal(outputs(ours, tokens(), sequence_embeds=users()), outputs(lora, tokens()))
    torch.manual_seed(4)
    lora.train()(tokens(), labels=tokens()).loss.backward()
    torch.manual_seed(4)
    result = {name: value for name, value in gradients(ours.train(), users()).items() if "lora_gate" not in name}
    assert_same_gradients(result, gradients_of(lora))


@pytest.mark.parametrize("k", [0, K - 1])
def test_one_hot_gate_is_that_expert_alone(k):
    ours, p = adapted(), R // K
    weight = ours.base_model.lora_gate["default"].W_g.weight
    nn.init.zeros_(weight)
    weight.data[k] = 1e4
    z = users().abs()  # logits of 0 and at least hundreds: softmax is one-hot to the last bit
    assert torch.equal(gate_weights(ours, z), torch.eye(K, dtype=torch.float64)[[k] * BATCH])
    expert = plain_lora(r=p)
    for name, layer in expert.named_modules():
        if isinstance(layer, LoraLayer):
            whole = ours.get_submodule(name)
            layer.lora_A["default"].weight.data = whole.lora_A["default"].weight[k * p : (k + 1) * p].detach()
            layer.lora_B["default"].weight.data = whole.lora_B["default"].weight[:, k * p : (k + 1) * p].detach()
    assert_close(outputs(ours, tokens(), sequence_embeds=z), outputs(expert, tokens()))


class Repeating(Perceptron):
    """Its first layer runs without gradients, then the same layers run three times."""

    def forward(self, x):
        with torch.no_grad():
            super().forward(x)
        return sum(super(Repeating, self).forward(x * scale) for scale in (1, 2, 3))


@pytest.mark.parametrize("per_layer", [False, True])
def test_layers_that_run_often_share_one_gate(per_layer):
    """Eq. 12 written out for a layer that is called more often than there are layers, and once without gradients."""
    torch.manual_seed(0)
    model = get_peft_model(Repeating().double(), config("perceptron", gate_per_layer=per_layer)).eval()
    x, z = inputs("perceptron"), users()
    model(x, sequence_embeds=z).square().sum().backward()
    result = gradients_of(model)
    assert any("lora_gate" in name for name in result)
    model.zero_grad()
    first, second = model.base_model.model.first, model.base_model.model.second
    w = gate_weights(model, z) if per_layer else [gate_weights(model, z)] * 2
    repeated = (eq_12(second, eq_12(first, x * scale, w[0]).relu(), w[1]) for scale in (1, 2, 3))
    sum(repeated).square().sum().backward()
    assert_same_gradients(result, gradients_of(model), 1e-10)


@pytest.mark.parametrize("options", [{}, {"gate_per_layer": True}, {"gate": "convolutional"}, {"gate_top_k": 2}])
def test_mixed_users_are_each_user_alone(options):
    """Batch composition, batch order and left padding change no user's logits; another user's z does."""
    model, ids, z = adapted(**options), tokens(), users()
    together = outputs(model, ids, sequence_embeds=z)
    for row in range(BATCH):
        alone = outputs(model, ids[row : row + 1], sequence_embeds=z[row : row + 1])
        assert_close(together[row : row + 1], alone)
    order = torch.tensor([2, 0, 1])
    assert_close(outputs(model, ids[order], sequence_embeds=z[order]), together[order])
    padded = torch.cat([torch.zeros(BATCH, 2, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs = {"attention_mask": mask, "position_ids": positions, "sequence_embeds": z}
    assert_close(outputs(model, padded, **kwargs)[:, 2:], together)
    assert (outputs(model, ids, sequence_embeds=z[order]) - together).abs().max() > 1e-3


def test_a_gate_by_clusters_gives_each_user_the_expert_of_the_nearest_centre():
    model = adapted(gate="clusters", num_experts=2)
    gate = model.base_model.lora_gate["default"]
    assert not list(gate.parameters())
    assert gate(users()).isnan().all()  # before its centres are known no loss is finite
    group = torch.tensor([0, 1, 1, 0, 1])
    gate.centres.copy_(torch.eye(D)[:2])
    w = gate(torch.eye(D)[group] + 0.01 * torch.randn(5, D))
    assert w.sum(1).tolist() == w.amax(1).tolist() == [1.0] * 5
    assert torch.equal(w.argmax(1), group)


def test_zero_initialised_B_leaves_the_base_model_bit_equal():
    model = adapted(init_lora_weights=True)
    assert torch.equal(outputs(model, tokens(), sequence_embeds=users()), outputs(base(), tokens()))


@pytest.mark.parametrize("per_layer", [False, True])
def test_trainable_parameters(per_layer):
    """Only adapter and gate learn; they are LoRA's parameters plus K * gate_dim for each gate."""
    model, lora = adapted(gate_per_layer=per_layer), plain_lora()
    layers = sum(isinstance(layer, LoraLayer) for layer in model.modules())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(gradients(model, users()))
    assert all(".lora_" in name for name in trainable)
    gates = layers if per_layer else 1
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + gates * K * D


def test_representations_receive_gradients():
    """A projector or encoder below z can be trained through the gate."""
    z = users().requires_grad_()
    gradients(adapted(), z)
    assert (z.grad.abs().sum(-1) > 0).all()


def test_autocast_keeps_the_gate_in_float32():
    model, lora = adapted(dtype=torch.float32), plain_lora(torch.float32)
    z = users(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate_weights(model, z), gate_weights(model.float(), z))
        assert gate_weights(model, z).dtype == torch.float32
        result = gradients(model, z)
        make_uniform(model)
        assert torch.equal(outputs(model, tokens(), sequence_embeds=z), outputs(lora, tokens()))
    assert all(gradient.isfinite().all() for gradient in result.values())
    assert result["base_model.lora_gate.default.W_g.weight"].abs().max() > 0


class Launches(TorchDispatchMode):
    """Counts the operations that compute or copy: what a GPU launches, a kernel each."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += not operation.is_view
        return operation(*args, **(kwargs or {}))


def launches(model, **keywords):
    with torch.autocast("cpu", torch.bfloat16), Launches() as counted:
        model(tokens(), labels=tokens(), **keywords).loss.backward()
    return counted.number


@pytest.mark.parametrize("per_layer", [False, True])
def test_training_under_autocast_launches_no_more_than_lora(per_layer):
    """An adapted layer's input is not cast to and fro, which pays for the gate; gates per layer are applied at once."""
    model, lora = adapted(dtype=torch.bfloat16, gate_per_layer=per_layer).train(), plain_lora(torch.bfloat16).train()
    assert launches(model, sequence_embeds=users()) <= launches(lora)


@pytest.mark.parametrize("top_k", [None, 2])
def test_gates_per_layer_applied_at_once_are_each_gate_alone(top_k, monkeypatch):
    """Outputs and gradients, also of a copied model and where a second adapter has gates of its own."""
    model = copy.deepcopy(adapted(gate_per_layer=True, gate_top_k=top_k))
    at_once, result = gradients(model, users()), outputs(model, tokens(), sequence_embeds=users())
    model.add_adapter("second", config(gate_per_layer=True, num_experts=2))
    assert torch.equal(outputs(model, tokens(), sequence_embeds=users()), result)
    monkeypatch.setattr(conditioning, "weights_of_all", lambda gates, z: None)
    assert_close(outputs(model, tokens(), sequence_embeds=users()), result)
    alone = gradients(model, users())
    assert sum("lora_gate" in name for name in alone) == 2 * len(SEVEN)
    assert_same_gradients(at_once, alone)


def test_input_that_is_not_cast_changes_no_bit():
    model = adapted(dtype=torch.bfloat16)

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, users()) | {"logits": outputs(model, tokens(), sequence_embeds=users())}

    expected = results()
    for layer in model.base_model.adapted_layers():
        layer.cast_input_dtype_enabled = True  # as LoRA does it
    again = results()
    assert expected.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_casting_can_be_disabled_as_in_lora():
    model = adapted(dtype=torch.bfloat16)
    expected = outputs(model, tokens(), sequence_embeds=users())
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        outputs(model, tokens(), sequence_embeds=users())
    assert torch.equal(outputs(model, tokens(), sequence_embeds=users()), expected)


def test_bfloat16_base_has_a_float32_gate():
    model = adapted(dtype=torch.bfloat16)
    logits = outputs(model, tokens(), sequence_embeds=users())
    assert logits.dtype == torch.bfloat16
    assert model.base_model.lora_gate["default"].W_g.weight.dtype == torch.float32
    exact = outputs(adapted(dtype=torch.float32), tokens(), sequence_embeds=users())
    assert (logits.float() - exact).abs().max() < 0.05


# ---- gradient checkpointing, compilation, threads


CHECKPOINTS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
GATES = [{}, {"gate_per_layer": True}, {"gate": "convolutional"}, {"gate_top_k": 2}]


@CHECKPOINTS
@pytest.mark.parametrize("options", GATES)
def test_checkpointing_changes_no_gradient(reentrant, options):
    model = adapted(**options, lora_dropout=0.1).train()
    torch.manual_seed(4)
    expected = gradients(model, users())
    statistics = copy.deepcopy([*model.base_model.lora_gate.buffers()])
    model = adapted(**options, lora_dropout=0.1).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(4)
    assert_same_gradients(gradients(model, users()), expected)
    assert_close([*model.base_model.lora_gate.buffers()], statistics)  # batch norm saw the batch once


@CHECKPOINTS
def test_checkpoints_launch_as_much_for_gates_per_layer_as_for_a_shared_one(reentrant):
    """But for the stack of all W_g and those of the gradients of w: no block computes gradients of other blocks' w."""
    shared, own = (adapted(dtype=torch.bfloat16, gate_per_layer=per_layer).train() for per_layer in (False, True))
    for model in (shared, own):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert launches(own, sequence_embeds=users()) <= launches(shared, sequence_embeds=users()) + 3


@CHECKPOINTS
def test_checkpointing_recomputes_with_its_own_users(reentrant):
    """Two forwards before two backwards, the latter in another thread, inside yet another user's context."""
    model = adapted().train()
    expected = {seed: gradients(model, users(seed=seed), tokens(seed=seed)) for seed in (5, 6)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = {
        seed: model(tokens(seed=seed), labels=tokens(seed=seed), sequence_embeds=users(seed=seed)).loss
        for seed in expected
    }
    for seed, loss in losses.items():
        model.zero_grad()
        with model.sequence_embeds(users(seed=7)):
            in_threads([loss.backward])
        assert_same_gradients(gradients_of(model), expected[seed])


def one_layer():
    model = adapted(target_modules=["q_proj", "down_proj"])
    del model.base_model.model.model.layers[1:]
    return model


@pytest.mark.slow
def test_compiles_as_one_graph_for_all_shapes():
    torch._dynamo.reset()
    counter, model = CompileCounter(), one_layer()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in [(3, 7), (2, 5), (5, 9)]:
        ids, z = tokens(rows, length), users(rows)
        assert_close(outputs(compiled, ids, sequence_embeds=z), outputs(model, ids, sequence_embeds=z))
    assert counter.frame_count == 1
    with model.sequence_embeds(users()):
        assert_close(outputs(compiled, tokens()), outputs(model, tokens()))


def test_compiled_rows_of_one_vector_have_no_matrices_of_their_own():
    """(b, d_out, r) would be r times the output, which matters where b is large."""

    def backend(graph, _):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        sizes.extend(value.numel() for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    torch._dynamo.reset()
    sizes, model, x = [], adapted("perceptron"), inputs("perceptron", rows=100)
    expected = outputs(model, x, sequence_embeds=users(100))
    assert_close(outputs(torch.compile(model, backend=backend), x, sequence_embeds=users(100)), expected)
    assert max(sizes) == expected.numel()


@pytest.mark.slow
def test_compiled_gradients_with_checkpointing():
    torch._dynamo.reset()
    model = one_layer().train()
    expected = gradients(model, users())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients(model, users())  # an eager step first, as in a warm notebook
    compiled = gradients(torch.compile(model, backend="eager"), users())
    assert_same_gradients({name.removeprefix("_orig_mod."): value for name, value in compiled.items()}, expected)


@pytest.mark.parametrize("switch", [False, True])
def test_a_compiled_pass_after_an_interrupted_one_has_its_own_users(switch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = adapted(gate_per_layer=True)
    model.add_adapter("second", config(gate_per_layer=True))
    expected = outputs(model, tokens(), sequence_embeds=users())
    hook = model.base_model.model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), sequence_embeds=users(seed=4))
    hook.remove()
    if switch:
        model.set_adapter("second")
        outputs(model, tokens(), sequence_embeds=users(seed=5))
        model.set_adapter("default")
    assert_close(outputs(torch.compile(model, backend="eager"), tokens(), sequence_embeds=users()), expected)
    gates = [layer.lora_gate[name] for layer in model.adapted_layers() for name in ("default", "second")]
    assert all(gate.applied.values == [None] for gate in gates)  # whose graphs can be freed


def test_threads_keep_their_users_apart():
    model = adapted()
    expected = {seed: outputs(model, tokens(), sequence_embeds=users(seed=seed)) for seed in range(4)}
    barrier, wrong = threading.Barrier(len(expected)), []

    def serve(seed):
        with model.sequence_embeds(users(seed=seed)):
            for _ in range(10):
                barrier.wait()
                if not torch.equal(outputs(model, tokens()), expected[seed]):
                    wrong.append(seed)

    in_threads([partial(serve, seed) for seed in expected])
    assert not wrong


# ---- generation


def alone(model, ids, z, **kwargs):
    """Generate for each prompt by itself and stack the results."""
    rows = zip(ids.split(1), z.split(1), strict=True)
    return torch.cat([model.generate(i, sequence_embeds=u, **kwargs) for i, u in rows])


GENERATION = {
    "greedy": {"do_sample": False},
    "greedy without cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("options", [{}, {"gate_per_layer": True}])
def test_generate_is_each_user_alone(how, options):
    model, kwargs = adapted(**options), {**GENERATION[how], "max_new_tokens": 4}
    together = model.generate(tokens(), sequence_embeds=users(), **kwargs)
    assert torch.equal(together, alone(model, tokens(), users(), **kwargs))
    with model.sequence_embeds(users()):
        assert torch.equal(model.generate(tokens(), **kwargs), together)
    as_config = GenerationConfig(**kwargs, pad_token_id=0)
    assert torch.equal(model.generate(tokens(), as_config, sequence_embeds=users()), together)
    assert torch.equal(model.generate(tokens(), generation_config=as_config, sequence_embeds=users()), together)
    assert not torch.equal(model.generate(tokens(), sequence_embeds=users().flip(0), **kwargs), together)


def test_greedy_generation_is_the_argmax_of_forward():
    model, ids = adapted(), tokens()
    generated = model.generate(ids, sequence_embeds=users(), max_new_tokens=3, do_sample=False)
    for _ in range(3):
        following = outputs(model, ids, sequence_embeds=users())[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    assert torch.equal(generated, ids)


def test_sampling_several_sequences_uses_each_prompts_user():
    model = adapted()
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "max_new_tokens": 1, "output_scores": True}
    result = model.generate(tokens(), sequence_embeds=users(), return_dict_in_generate=True, **options)
    exact = outputs(model, tokens(), sequence_embeds=users())[:, -1]
    assert_close(result.scores[0].double(), exact.repeat_interleave(2, dim=0), 1e-6)


def test_cached_forward_is_the_whole_forward():
    model, ids, z = adapted(), tokens(), users()
    whole = outputs(model, ids, sequence_embeds=z)
    with torch.no_grad():
        prompt = model(ids[:, :4], sequence_embeds=z, use_cache=True)
        rest = model(ids[:, 4:], sequence_embeds=z, past_key_values=prompt.past_key_values)
    assert_close(torch.cat([prompt.logits, rest.logits], dim=1), whole)


def test_decoder_alone_in_the_context():
    """A loop may enter below the whole model, say for hidden states without logits."""
    model = adapted()
    expected = outputs(model, tokens(), sequence_embeds=users())
    with model.sequence_embeds(users()), torch.no_grad():
        hidden = model.base_model.model.model(tokens()).last_hidden_state
    assert_close(model.base_model.model.lm_head(hidden), expected)


# ---- several adapters, disabled, merged, exported


def test_several_adapters_keep_their_gates_apart():
    model = adapted()
    first = outputs(model, tokens(), sequence_embeds=users())
    model.add_adapter("second", config(num_experts=2, gate="convolutional", gate_per_layer=True))
    model.eval()
    assert torch.equal(outputs(model, tokens(), sequence_embeds=users()), first)
    model.set_adapter("second")
    second = outputs(model, tokens(), sequence_embeds=users())
    assert (second - first).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "second"])  # both at once, as PEFT allows: the deltas add up
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(BATCH, 5, layer.in_features, dtype=torch.float64)
    with model.sequence_embeds(users()), torch.no_grad():
        deltas = {}
        for name in ("default", "second", ["default", "second"]):
            model.base_model.set_adapter(name)
            deltas[str(name)] = layer(x) - layer.base_layer(x)
    assert_close(deltas["['default', 'second']"], deltas["default"] + deltas["second"])
    model.delete_adapter("second")
    assert torch.equal(outputs(model, tokens(), sequence_embeds=users()), first)
    assert not any("second" in name for name in model.state_dict())


def test_shared_gate_is_trainable_exactly_with_its_adapter():
    model = adapted()
    gate = model.base_model.lora_gate["default"]

    def trainable(gate):
        return all(parameter.requires_grad for parameter in gate.parameters())

    assert trainable(gate)
    model.add_adapter("second", config())
    second = model.base_model.lora_gate["second"]
    assert trainable(gate) and not trainable(second)
    model.set_adapter("second")
    assert not trainable(gate) and trainable(second)
    with model.disable_adapter():
        assert not trainable(second)
    assert trainable(second)
    model.set_requires_grad("second", False)
    assert not trainable(second)
    model.set_adapter("default", inference_mode=True)
    assert not trainable(gate)
    model.delete_adapter("default")
    assert list(model.base_model.lora_gate) == ["second"]


def run_elsewhere(script, folder):
    """Run a script in a process that finds no package of this repository but what lies in the folder."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_export_loads_without_the_package_and_ilora_does_not(tmp_path):
    model, z = adapted(dtype=torch.float32), users(dtype=torch.float32)
    model.save_pretrained(tmp_path / "ilora")
    export_lora(model, z[:1], tmp_path / "lora")
    base(dtype=torch.float32).save_pretrained(tmp_path / "base")
    script = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}, dtype=torch.float32)
try:
    PeftModel.from_pretrained(base, {str(tmp_path / "saved")!r})
except KeyError as error:
    print(error)
lora = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r})
torch.save(lora(torch.tensor({tokens().tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    (tmp_path / "ilora").rename(tmp_path / "saved")  # nothing in the folder has the package's name
    assert "ILORA" in run_elsewhere(script, tmp_path)
    expected = outputs(model, tokens(), sequence_embeds=z[:1].expand_as(z))
    assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, 1e-5)


def test_the_adapter_needs_only_its_folder(tmp_path):
    """A copy of ilora/adapter/, ilora/__init__.py and ilora/errors.py works where pandas and the like are missing."""
    package = Path(ilora.__file__).parent
    shutil.copytree(package / "adapter", tmp_path / "ilora" / "adapter")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(package / name, tmp_path / "ilora" / name)
    script = """
import sys
for name in ("pandas", "scipy", "matplotlib", "sklearn"):
    sys.modules[name] = None  # an import fails, as if it were not installed
import ilora.adapter, torch
from peft import get_peft_model
config = ilora.ILoraConfig(target_modules=["0"], gate_dim=3, task_type=None)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
print(*model(torch.ones(5, 2), sequence_embeds=torch.ones(5, 3)).shape, ilora.__file__)
print(*sorted(name for name in sys.modules if name.startswith("ilora.") and name.count(".") == 1))
"""
    shape, modules = run_elsewhere(script, tmp_path).splitlines()
    assert shape == f"5 2 {tmp_path / 'ilora' / '__init__.py'}"
    assert modules == "ilora.adapter ilora.errors"


def test_unloaded_base_is_as_before():
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model(tokens(), sequence_embeds=users())
    unloaded = model.unload().eval()
    assert torch.equal(outputs(unloaded, tokens()), outputs(base(), tokens()))
    assert not unloaded._forward_pre_hooks and not unloaded._forward_hooks
    assert all("Carrying" not in str(vars(module)) for module in unloaded.modules())


# ---- gates


def test_top_k_keeps_the_largest_weights_renormalised():
    soft, hard = adapted(), adapted(gate_top_k=2)
    w, kept = gate_weights(soft, users(64)), gate_weights(hard, users(64))
    assert ((kept > 0).sum(-1) == 2).all()
    largest = w.topk(2, dim=-1)
    assert_close(kept.gather(-1, largest.indices), largest.values / largest.values.sum(-1, keepdim=True))
    assert (gate_weights(adapted(gate_top_k=K), users()) == gate_weights(soft, users())).all()
    assert gradients(hard, users())["base_model.lora_gate.default.W_g.weight"].abs().max() > 0


@pytest.mark.parametrize("options", GATES)
def test_gate_weights_sum_to_one(options):
    w = gate_weights(adapted(**options), users(16))
    assert w.shape[-2:] == (16, K)
    assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
    assert (w >= 0).all()


# ---- what is refused, each in one sentence with the remedy


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_experts": 3}, "rank 8 is not divisible by num_experts=3"),
        ({"rank_pattern": {"q_proj": 6}}, "rank 6 is not divisible by num_experts=4"),
        ({"num_experts": 0}, "at least 1"),
        ({"gate_dim": 0}, "at least 1"),
        ({"gate": "quadratic"}, "choose one of linear, convolutional, clusters"),
        ({"gate_top_k": 5}, "keep 2 to num_experts=4"),
        ({"gate_top_k": 1}, "constant 1"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_config_refuses(options, sentence):
    with pytest.raises(UserError, match=sentence):
        config(**options)


def test_forward_refuses_wrong_representations():
    model, ids = adapted(), tokens()
    with pytest.raises(UserError, match="pass sequence_embeds=z"):
        model(ids)
    with pytest.raises(UserError, match="pass sequence_embeds=z"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(UserError, match=r"shape \(batch, 6\), not \(3, 5\)"):
        model(ids, sequence_embeds=users()[:, :5])
    with pytest.raises(UserError, match=r"not \(6,\)"):
        model(ids, sequence_embeds=users()[0])
    for rows in (1, 2, 4):
        with pytest.raises(UserError, match=f"{rows} rows but an adapted layer got \\(3, 7, 32\\)"):
            model(ids, sequence_embeds=users(rows))
        with pytest.raises(UserError, match=f"{2 * rows} rows but an adapted layer got \\(6, 7, 32\\)"):
            model.generate(ids, sequence_embeds=users(rows), num_beams=2, max_new_tokens=1)
    with pytest.raises(UserError, match="pass sequence_embeds=z"):
        model(ids)  # nothing of the failed calls remains


def test_an_interrupted_forward_leaves_no_user_behind():
    model = adapted()

    def interrupt(*_):
        raise KeyboardInterrupt

    def nobody_is_left():
        for call in (model, lambda ids: model.generate(ids, max_new_tokens=1)):
            with pytest.raises(UserError, match="pass sequence_embeds=z"):
                call(tokens())

    hook = model.base_model.model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), model.sequence_embeds(users()):
        model(tokens())
    hook.remove()
    nobody_is_left()
    hook = model.base_model.model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), sequence_embeds=users())
    hook.remove()
    assert model.generate(tokens(), sequence_embeds=users(), max_new_tokens=1).shape == (BATCH, 8)
    nobody_is_left()


class Interrupted(list):
    """Raises where its second value is appended, as a signal between two instructions does."""

    def append(self, value):
        if len(self) == 2:
            raise KeyboardInterrupt
        super().append(value)


def test_an_interruption_before_a_checkpointed_block_leaves_no_user_behind():
    model = adapted(gate_per_layer=True).train()
    model.gradient_checkpointing_enable()
    applied = model.adapted_layers()[3].lora_gate["default"].applied
    applied.values = Interrupted(applied.values)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), sequence_embeds=users())
    applied.values = list(applied.values)
    with pytest.raises(UserError, match="pass sequence_embeds=z"):
        model(tokens())


@pytest.mark.parametrize("where", ["in another order", "in another thread"])
def test_contexts_that_end_elsewhere_leave_the_model_usable(where):
    def stream(seed):
        with model.sequence_embeds(users(seed=seed)):
            yield outputs(model, tokens())

    model, results = adapted(gate_per_layer=True), []
    expected, streams = outputs(model, tokens(), sequence_embeds=users()), [stream(seed) for seed in (3, 4)]
    for each in streams:
        next(each)

    def end():
        for each in streams:
            each.close()
        results.append(outputs(model, tokens(), sequence_embeds=users()))

    end() if where == "in another order" else in_threads([end])
    assert_close(results, [expected])


def test_merge_and_export_refuse_all_but_one_user(tmp_path):
    model = adapted()
    untouched = copy.deepcopy(model.state_dict())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match=r"call inside `with model.sequence_embeds"):
            merge()
        with pytest.raises(UserError, match="exactly one user"), model.sequence_embeds(users()):
            merge()
    with pytest.raises(UserError, match="exactly one user"):
        export_lora(model, users(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())


def test_what_the_gate_cannot_carry_is_refused():
    model = adapted()
    with pytest.raises(UserError, match="export_lora"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(UserError, match="adapter_names"):
        model(tokens(), sequence_embeds=users(), adapter_names=["default", "__base__", "default"])
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match="use `get_peft_model` instead"):
        inject_adapter_in_model(config(), base())
    for length in (7, 1):  # OPT's fc1 sees (batch * length, hidden)
        with pytest.raises(UserError, match="loose tokens"):
            adapted("opt", target_modules=["fc1"])(tokens(length=length), sequence_embeds=users())
    with pytest.raises(UserError, match="linear layers, not Embedding"):
        adapted(target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"set task_type in ILoraConfig .*None for a module outside transformers"):
        get_peft_model(Perceptron(), config("perceptron", task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="CAUSAL_LM"):
        adapted(task_type=None)


@pytest.mark.parametrize("ignorant", ["AwqLoraLinear", "TorchaoLoraLinear"])
def test_layers_that_would_ignore_the_gate_are_refused(ignorant, monkeypatch):
    """PEFT's layers for some quantised bases never call their variant; names replace the libraries."""
    layer = type(ignorant, (LoraLinear,), {})
    monkeypatch.setattr("peft.tuners.lora.model.dispatch_default", lambda target, name, **kw: layer(target, name, **kw))
    with pytest.raises(UserError, match="another quantisation"):
        adapted()


def test_trainer_that_drops_the_column_says_so(tmp_path):
    rows = [{"input_ids": ids, "labels": ids, "sequence_embeds": z} for ids, z in zip(tokens(), users(), strict=True)]
    for remove in (True, False):
        model = adapted(dtype=torch.float32)
        options = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), remove_unused_columns=remove, **options)
        trainer = Trainer(model, arguments, train_dataset=rows)
        if remove:
            with pytest.raises(UserError, match="remove_unused_columns=False"):
                trainer.train()
        else:
            assert trainer.train().global_step == 1


# ---- several processes


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    script = Path(__file__).with_name("adapter_two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_a_gate_gives_for_one_user_does_not_depend_on_the_mode(per_layer, tmp_path):
    """A Trainer leaves the model in training mode, in which batch norm reads and learns from the rows that it gets."""
    model = adapted(gate="convolutional", gate_per_layer=per_layer)
    z = users(3)
    model.train()(input_ids=tokens(), sequence_embeds=z)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = outputs(model.eval(), tokens()[:1], sequence_embeds=z[:1])
    w = gate_weights(model, z)
    model.train()
    assert_close(gate_weights(model, z), w)
    plain = PeftModel.from_pretrained(base(), export_lora(model, z[:1], tmp_path))
    assert_close(outputs(plain.eval(), tokens()[:1]), expected, 1e-5)
    with model.sequence_embeds(z[:1]):
        model.merge_adapter()
    assert_close(outputs(model.eval(), tokens()[:1]), expected, 1e-5)
    model.train().unmerge_adapter()
    assert all(part.training for part in model.modules())
    buffers = [name for name in before if "running" in name or "tracked" in name]
    assert buffers
    for name in buffers:
        assert torch.equal(model.state_dict()[name], before[name])
