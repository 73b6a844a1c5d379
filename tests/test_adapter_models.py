"""PEFT's kinds of cases for every shape of model: files, merging, several adapters, dtypes, copies, training.

The models, the inputs and the comparisons are those of test_adapter.py, which has the method's identities.
"""

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from test_adapter import (
    ARCHITECTURES,
    BATCH,
    CHECKPOINTS,
    GATES,
    adapted,
    alone,
    assert_close,
    assert_same_gradients,
    base,
    config,
    gradients,
    inputs,
    outputs,
    tokens,
    users,
)
from torch import nn

from ilora.adapter import ILoraConfig, ILoraModel, export_lora
from ilora.errors import UserError

models = pytest.mark.parametrize("architecture", ARCHITECTURES)
models_and_gates = pytest.mark.parametrize(
    ("architecture", "options"), [*((name, {}) for name in ARCHITECTURES), *(("llama", gate) for gate in GATES[1:])]
)
writers = pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "perceptron"])


def results(model, architecture, z=None):
    return outputs(model, inputs(architecture), sequence_embeds=users() if z is None else z)


def everyone(z):
    """One user (1, d) for every row of the batch."""
    return z.expand(BATCH, -1)


# ---- files


@models_and_gates
def test_saved_and_loaded(architecture, options, tmp_path):
    """Stock save_pretrained and from_pretrained carry the gate, under any adapter name, empty or not."""
    model, x = adapted(architecture, **options), inputs(architecture)
    expected = outputs(model, x, sequence_embeds=users())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ILORA"
    assert any("lora_gate." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert isinstance(PeftConfig.from_pretrained(tmp_path), ILoraConfig)
    for kwargs in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(base(architecture), tmp_path, **kwargs).eval()
        assert isinstance(loaded.base_model, ILoraModel)
        assert_close(outputs(loaded, x, sequence_embeds=users()), expected)
        gates = [p.requires_grad for name, p in loaded.named_parameters() if "lora_gate" in name]
        assert gates == [kwargs.get("is_trainable", False)] * len(gates)
    loaded.load_adapter(tmp_path, "another")
    loaded.set_adapter("another")
    assert_close(outputs(loaded, x, sequence_embeds=users()), expected)


@models_and_gates
def test_exported_user_is_a_plain_lora(architecture, options, tmp_path):
    model, x, z = adapted(architecture, **options), inputs(architecture), users()
    expected = outputs(model, x, sequence_embeds=z[1:2].expand_as(z))
    export_lora(model, z[1:2], tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = PeftModel.from_pretrained(base(architecture), tmp_path).eval()
    assert type(lora.base_model) is LoraModel
    assert_close(outputs(lora, x), expected)
    assert torch.equal(outputs(model, x, sequence_embeds=z[1:2].expand_as(z)), expected)  # unharmed


class FolderHub:
    """Replaces the Hugging Face hub: a repository is a folder, a commit puts its files there."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        (self.folder / repo_id).mkdir(parents=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / repo_id / operation.path_in_repo)


@models
def test_pushed_to_the_hub_the_gate_travels_with_the_adapter(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: FolderHub(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("a card"))
    model = adapted(architecture)
    model.push_to_hub("somebody/ilora")
    pushed = tmp_path / "somebody" / "ilora"
    files = {path.name for path in pushed.iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    gate = load_file(pushed / "adapter_model.safetensors")["base_model.lora_gate.W_g.weight"]
    assert torch.equal(gate, model.base_model.lora_gate["default"].W_g.weight)
    loaded = PeftModel.from_pretrained(base(architecture), pushed).eval()
    assert torch.equal(results(loaded, architecture), results(model, architecture))


@models_and_gates
def test_state_dict_carried_by_hand(architecture, options):
    """PEFT's pair of functions; everything that training changes is in it."""
    model, other = adapted(architecture, **options), base(architecture)
    torch.manual_seed(9)
    other = get_peft_model(other, config(architecture, **options)).eval()
    assert not torch.isclose(results(other, architecture), results(model, architecture)).all()
    state = get_peft_model_state_dict(model)
    keys = set_peft_model_state_dict(other, state)
    assert not keys.unexpected_keys and not [key for key in keys.missing_keys if "lora_" in key]
    assert torch.equal(results(other, architecture), results(model, architecture))
    trained = [p for p in model.parameters() if p.requires_grad] + [*model.base_model.lora_gate.buffers()]
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in trained)


@pytest.mark.parametrize("options", [*GATES, {"num_experts": 2, "gate_dim": 3, "rank_pattern": {"q_proj": 4}}])
def test_config_comes_back_as_it_was_saved(options, tmp_path):
    saved = config(**options)
    saved.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is ILoraConfig
    assert loaded.to_dict() == saved.to_dict()


def test_an_adapter_saved_by_0_1_loads():
    """The files and the numbers below come from version 0.1 around the identity."""
    base = nn.Sequential(nn.Linear(2, 2))
    nn.init.eye_(base[0].weight)
    nn.init.zeros_(base[0].bias)
    model = PeftModel.from_pretrained(base, Path(__file__).with_name("adapter_of_0_1")).eval()
    assert type(model.peft_config["default"]) is ILoraConfig
    expected = [[-0.6709249, -0.4602170], [-0.7869654, -1.4968052], [-0.1096172, -1.7080961]]
    result = outputs(model, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), sequence_embeds=torch.eye(3))
    assert_close(result, torch.tensor(expected), 1e-6)


# ---- merged, disabled, several adapters


@models
def test_merged_for_one_user(architecture):
    model, x, z = adapted(architecture), inputs(architecture), users()
    untouched = copy.deepcopy(model.state_dict())
    expected = outputs(model, x, sequence_embeds=z[:1].expand_as(z))
    for safe in (False, True):
        with model.sequence_embeds(z[:1]):
            model.merge_adapter(safe_merge=safe)
        assert_close(outputs(model, x), expected)
        with pytest.raises(UserError, match="merged for one user"):
            model(x, sequence_embeds=z)
        model.unmerge_adapter()
    assert_close(dict(model.state_dict()), dict(untouched))
    with model.sequence_embeds(z[:1]):
        merged = model.merge_and_unload()
    assert type(merged) is type(base(architecture))
    assert_close(outputs(merged, x), expected)


@models
def test_disabled_adapter_is_the_base_model(architecture):
    model, x = adapted(architecture), inputs(architecture)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), outputs(base(architecture), x))
        assert torch.equal(outputs(model, x, sequence_embeds=users()), outputs(base(architecture), x))
    assert not torch.equal(outputs(model, x, sequence_embeds=users()), outputs(base(architecture), x))


def two_adapters(architecture):
    """A model with the adapters `default` and `second`, with other experts and gates; `default` is active."""
    model = adapted(architecture)
    torch.manual_seed(5)
    model.add_adapter("second", config(architecture, num_experts=2, gate_per_layer=True))
    return model.eval()


@models
def test_several_adapters_compute_as_if_alone(architecture, tmp_path):
    model = two_adapters(architecture)
    first = results(model, architecture)
    assert torch.equal(first, results(adapted(architecture), architecture))
    model.set_adapter("second")
    second = results(model, architecture)
    assert (second - first).abs().max() > 1e-3
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [path.parent.name for path in tmp_path.rglob("adapter_model.safetensors")] == ["second"]
    alone = PeftModel.from_pretrained(base(architecture), tmp_path / "second").eval()
    assert torch.equal(results(alone, architecture), second)
    alone.load_adapter(tmp_path / "second", "copy")
    alone.delete_adapter("default")
    alone.set_adapter("copy")
    assert torch.equal(results(alone, architecture), second)
    model.set_adapter("default")
    assert torch.equal(results(model, architecture), first)


@models
def test_two_adapters_merge_for_one_user(architecture):
    model, z = two_adapters(architecture), users()[:1]
    model.base_model.set_adapter(["default", "second"])
    both = results(model, architecture, everyone(z))
    for names in (["default"], ["second"]):
        model.base_model.set_adapter(names)
        assert (results(model, architecture, everyone(z)) - both).abs().max() > 1e-3
    with model.sequence_embeds(z):
        merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert_close(outputs(merged, inputs(architecture)), both)
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())


# ---- copies


@models
def test_copied_and_pickled(architecture):
    model, x = adapted(architecture), inputs(architecture)
    expected = outputs(model, x, sequence_embeds=users())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            assert all(parameter is not other for other in copied.parameters())
        assert_close(outputs(copied, x, sequence_embeds=users()), expected)
        for parameter in copied.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(outputs(model, x, sequence_embeds=users()), expected)


# ---- types of numbers


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False], ids=["adapter in float32", "adapter as the base"])
def test_halved_base_gives_near_results_of_its_type(architecture, dtype, wide):
    torch.manual_seed(1)
    model = get_peft_model(base(architecture, torch.float32), config(architecture)).eval()
    x, z = inputs(architecture), users(dtype=torch.float32)
    x = x.float() if architecture == "perceptron" else x
    exact = outputs(model, x, sequence_embeds=z)
    torch.manual_seed(1)
    halved = get_peft_model(base(architecture, dtype), config(architecture), autocast_adapter_dtype=wide).eval()
    set_peft_model_state_dict(halved, get_peft_model_state_dict(model))
    matrices = {p.dtype for name, p in halved.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert matrices == {torch.float32 if wide else dtype}
    assert {p.dtype for p in halved.parameters() if p.requires_grad} == matrices  # one type, as FSDP needs it
    result = outputs(halved, x.to(dtype) if x.is_floating_point() else x, sequence_embeds=z)
    assert result.dtype == dtype
    assert 0 < (result.float() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


# ---- training and generation


@models
def test_training_learns_and_moves_the_adapter_and_its_gate_alone(architecture):
    model, x = adapted(architecture, init_lora_weights=True).train(), inputs(architecture)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        result = model(x, sequence_embeds=users())
        logits = (result if isinstance(result, torch.Tensor) else result.logits).flatten(0, -2)
        losses.append(nn.functional.cross_entropy(logits, torch.arange(len(logits))))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


@writers
@CHECKPOINTS
def test_checkpointing_changes_no_gradient_of_any_shape(architecture, reentrant):
    expected = gradients(adapted(architecture).train(), users())
    model = adapted(architecture).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_same_gradients(gradients(model, users()), expected)
    assert len(calls) == 2  # once forward, once again


@writers
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generate_is_each_user_alone_in_any_shape(architecture, how):
    model, kwargs = adapted(architecture), {"do_sample": False, "max_new_tokens": 3, **how}
    together = model.generate(tokens(), sequence_embeds=users(), **kwargs)
    assert torch.equal(together, alone(model, tokens(), users(), **kwargs))
    assert not torch.equal(model.generate(tokens(), sequence_embeds=users().flip(0), **kwargs), together)
    padded = nn.functional.pad(tokens(), (2, 0))
    mask = (padded != 0).long()
    left = model.generate(padded, attention_mask=mask, sequence_embeds=users(), **kwargs)
    assert torch.equal(left[:, 2:], together)


@writers
def test_embeddings_instead_of_tokens(architecture):
    model = adapted(architecture)
    embeds = model.get_input_embeddings()(tokens())
    result = outputs(model, inputs_embeds=embeds, sequence_embeds=users())
    assert torch.equal(result, results(model, architecture))
