"""iLoRA and stock LoRA behave alike where PEFT, accelerate and transformers change a model."""

import asyncio
import gc
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from test_adapter import (
    ALPHA,
    BATCH,
    HEADS,
    SEVEN,
    D,
    K,
    R,
    adapted,
    assert_close,
    assert_same_gradients,
    base,
    config,
    gradients,
    in_threads,
    outputs,
    tokens,
    users,
)
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ilora.adapter import ILORA, export_lora, gate_weights
from ilora.errors import UserError


def lora():
    return LoraConfig(r=R, lora_alpha=ALPHA, target_modules=SEVEN, task_type="CAUSAL_LM", init_lora_weights=False)


KINDS = {
    "lora": lora,
    "shared gate": config,
    "gate per layer": lambda: config(gate_per_layer=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)
gated = pytest.mark.parametrize("kind", ["shared gate", "gate per layer"])
second_names = pytest.mark.parametrize("name", ["default", "second"])


def keywords(kind, rows=BATCH):
    return {} if kind == "lora" else {"sequence_embeds": users(rows)}


def wrapped(kind, model=None, name="default", seed=1, **kwargs):
    model = base() if model is None else model
    torch.manual_seed(seed)
    return get_peft_model(model, KINDS[kind](), name, **kwargs).eval()


def logits(kind, model):
    return outputs(model, tokens(), **keywords(kind))


# ---- a dropped model is freed


@kinds
@pytest.mark.parametrize("use", ["forward", "generate", "checkpointing", "context", "unload", "two wrappers"])
@pytest.mark.slow
def test_a_dropped_model_is_freed_without_the_garbage_collector(kind, use):
    gc.disable()
    try:
        model = base()
        freed = weakref.ref(model)
        model = wrapped(kind, model)
        layer = weakref.ref(next(module for module in model.modules() if isinstance(module, LoraLayer)))
        if use == "checkpointing":
            model.train().gradient_checkpointing_enable()
        if use == "two wrappers":
            model = wrapped(kind, model.get_base_model())
        model(tokens(), labels=tokens(), **keywords(kind)).loss.backward()
        if use == "generate":
            model.generate(tokens(), max_new_tokens=2, **keywords(kind))
        if use == "context":
            with model.sequence_embeds(users()) if kind != "lora" else nullcontext():
                model(tokens())
        if use == "unload":
            model = model.unload()
            assert layer() is None
        del model
        assert freed() is None and layer() is None
    finally:
        gc.enable()


# ---- wrapping again


@kinds
@second_names
@pytest.mark.parametrize("again", ["the base", "the wrapper"])
def test_wrapping_again_gives_the_second_adapter(kind, name, again):
    """As with stock LoRA both wrappers then compute with the second, whatever its name."""
    first = wrapped(kind)
    untouched = logits(kind, first)
    second = wrapped(kind, first if again == "the wrapper" else first.get_base_model(), name, seed=5)
    expected = logits(kind, wrapped(kind, seed=5))
    assert (expected - untouched).abs().max() > 1e-3
    for model in (first, second):
        assert_close(logits(kind, model), expected)
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, **keywords(kind)}
    written = wrapped(kind, seed=5).generate(tokens(), **beams)
    for model in (first, second):
        assert torch.equal(model.generate(tokens(), **beams), written)
    del first, model
    assert_close(logits(kind, second), expected)
    loss = second.train()(tokens(), labels=tokens(), **keywords(kind)).loss
    loss.backward()
    trained = {key for key, parameter in second.named_parameters() if parameter.grad is not None}
    assert trained and all(f".{name}." in key for key in trained)
    assert any("lora_gate" in key for key in trained) == (kind != "lora")


@gated
@second_names
@pytest.mark.parametrize("lora_first", [False, True])
def test_lora_and_ilora_on_one_base(kind, name, lora_first):
    """The last adapter computes as if it were the only one; a base in bfloat16 needs PEFT's cast of the inputs."""
    kinds, dtype = ("lora", kind) if lora_first else (kind, "lora"), torch.bfloat16
    shared = base().to(dtype)
    first = wrapped(kinds[0], shared)
    second = wrapped(kinds[1], shared, name, seed=5)
    expected = logits(kinds[1], wrapped(kinds[1], base().to(dtype), seed=5))
    assert_close(logits(kinds[1], second), expected)
    if name == "second":
        second.set_adapter("default")
        assert_close(logits(kinds[0], first), logits(kinds[0], wrapped(kinds[0], base().to(dtype))))


@kinds
@second_names
def test_loading_twice_on_one_base(kind, name, tmp_path):
    for number, seed in enumerate((1, 5)):
        wrapped(kind, seed=seed).save_pretrained(tmp_path / str(number))
    shared = base()
    first = PeftModel.from_pretrained(shared, tmp_path / "0").eval()
    assert_close(logits(kind, first), logits(kind, wrapped(kind)))
    second = PeftModel.from_pretrained(shared, tmp_path / "1", adapter_name=name).eval()
    for model in (first, second):
        assert_close(logits(kind, model), logits(kind, wrapped(kind, seed=5)))
    if name == "second":
        second.set_adapter("default")
        assert_close(logits(kind, second), logits(kind, wrapped(kind)))


@kinds
def test_unloading_and_wrapping_again(kind):
    model = wrapped(kind)
    logits(kind, model)
    again = wrapped(kind, model.unload(), seed=5)
    assert torch.equal(logits(kind, again), logits(kind, wrapped(kind, seed=5)))
    assert len(again.get_base_model()._forward_hooks) == (kind != "lora")


def test_another_kind_of_gate_on_the_second_wrapping():
    for first, second in (("shared gate", "gate per layer"), ("gate per layer", "shared gate")):
        model = wrapped(second, wrapped(first).get_base_model(), seed=5)
        assert_close(logits(second, model), logits(second, wrapped(second, seed=5)))
        assert set(gradients(model, users())) == {key for key, p in model.named_parameters() if p.requires_grad}


def test_wrapping_some_layers_again_leaves_the_others_their_gates():
    """As with stock LoRA the other layers keep the first adapter, here with another number of experts."""
    first = wrapped("gate per layer")
    again = config(gate_per_layer=True, target_modules=["q_proj"], num_experts=2)
    second = get_peft_model(first.get_base_model(), again)
    trained = gradients(second.train(), users())
    assert {len(gradient) for key, gradient in trained.items() if "lora_gate" in key} == {K, 2}


# ---- a merged model serves only its user


def merge_in(model, how):
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if how == "all":
        model.merge_adapter()
    elif how == "safe":
        model.merge_adapter(safe_merge=True)
    elif how == "named":
        model.merge_adapter(adapter_names=["second"])
    elif how == "first layer":
        layers[0].merge()
    elif how == "last layer":
        layers[-1].merge()


@gated
@pytest.mark.parametrize("how", ["all", "safe", "named", "first layer", "last layer"])
def test_a_merged_model_serves_nobody_else(kind, how):
    model = wrapped(kind)
    torch.manual_seed(5)
    model.add_adapter("second", KINDS[kind]())
    model.eval()
    before = logits(kind, model)
    with model.sequence_embeds(users()), model.sequence_embeds(users(1)):
        merge_in(model, how)
    for rows in (1, BATCH):
        z = users(rows)
        for call in (
            lambda z=z: model(tokens(len(z)), sequence_embeds=z),
            lambda z=z: model.generate(tokens(len(z)), sequence_embeds=z, max_new_tokens=1),
            lambda z=z: model.sequence_embeds(z).__enter__(),
        ):
            with pytest.raises(UserError, match=r"merged for one user.*unmerge_adapter"):
                call()
    if "layer" not in how:
        outputs(model, tokens())  # as the merged user
    model.unmerge_adapter()
    assert_close(logits(kind, model), before)
    with model.sequence_embeds(users(1)):
        merge_in(model, how)
        for call in (model, lambda ids: model.generate(ids, max_new_tokens=1)):
            with pytest.raises(UserError, match="merged for one user"):
                call(tokens())
        model.unmerge_adapter()
        model(tokens(1))


def test_a_merged_base_is_not_wrapped_again():
    model = adapted()
    with model.sequence_embeds(users(1)):
        model.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"):
        get_peft_model(model.get_base_model(), config())


# ---- offloading


def split(model):
    """One layer on the disk, one in the CPU's memory."""
    names = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    return {f"model.{name}": "disk" if name == "layers.1" else "cpu" for name in names} | {"lm_head": "cpu"}


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "device map": lambda model, folder: dispatch_model(
        model.get_base_model(), split(model), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@kinds
@pytest.mark.parametrize("where", OFFLOADS)
def test_offloaded_gives_the_same(kind, where, tmp_path):
    model = wrapped(kind)
    expected = logits(kind, model)
    OFFLOADS[where](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_close(logits(kind, model), expected)
    written = wrapped(kind).generate(tokens(), max_new_tokens=2, **keywords(kind))
    assert torch.equal(model.generate(tokens(), max_new_tokens=2, **keywords(kind)), written)


@gated
def test_offloaded_merges(kind):
    model = wrapped(kind)
    expected = outputs(model, tokens(), sequence_embeds=users(1).expand(BATCH, -1))
    cpu_offload(model, torch.device("cpu"))
    with model.sequence_embeds(users(1)):
        model.merge_adapter()
    assert_close(outputs(model, tokens()), expected)


@gated
def test_offloaded_compiles(kind):
    torch._dynamo.reset()
    model = wrapped(kind)
    expected = logits(kind, model)
    cpu_offload(model, torch.device("cpu"))
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    assert_close(logits(kind, model), expected)


# ---- what is trainable, and in which type


def flags(model, part):
    return {key: p.requires_grad for key, p in model.named_parameters() if f".{part}." in key}


@gated
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("event", ["add", "load", "add and delete", "set same", "set other and back", "disable"])
def test_a_gate_frozen_by_hand_is_treated_as_a_matrix_is(kind, frozen, event, tmp_path):
    """The first adapter's gates and its matrices A get the same flags, then the same is done to all."""
    model = wrapped(kind)
    model.save_pretrained(tmp_path)
    for key, parameter in model.named_parameters():
        if ".lora_gate." in key or ".lora_A." in key:
            parameter.requires_grad_(not frozen)
    if event in ("add", "add and delete", "set other and back"):
        model.add_adapter("second", KINDS[kind]())
    if event == "load":
        model.load_adapter(tmp_path, "second")
    if event == "add and delete":
        model.delete_adapter("second")
    if event == "set same":
        model.set_adapter("default")
    if event == "set other and back":
        model.set_adapter("second")
        assert not any(flag for key, flag in flags(model, "lora_gate").items() if ".default." in key)
        model.set_adapter("default")
    if event == "disable":
        with model.disable_adapter():
            assert not any(flags(model, "lora_gate").values())
    for name in ("default", "second"):
        gate, matrix = ({f for k, f in flags(model, p).items() if f".{name}." in k} for p in ("lora_gate", "lora_A"))
        assert gate == matrix
    if event in ("add", "load", "add and delete"):
        assert {f for k, f in flags(model, "lora_gate").items() if ".default." in k} == {not frozen}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("gate", ["linear", "convolutional"])
@pytest.mark.parametrize("wide", [True, False])
def test_all_of_an_adapter_has_one_type(per_layer, gate, wide, tmp_path):
    """FSDP flattens parameters of one type only."""
    dtype, options = torch.bfloat16, config(gate=gate, gate_per_layer=per_layer)
    model = get_peft_model(base(dtype=dtype), options, autocast_adapter_dtype=wide).eval()
    expected = torch.float32 if wide else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    w = gate_weights(model, users(dtype=dtype))
    assert w.dtype == torch.float32
    assert_close(w.sum(-1), torch.ones_like(w.sum(-1)), 1e-6)
    model.save_pretrained(tmp_path)
    for name in ("second", "third"):
        model.load_adapter(tmp_path, name, autocast_adapter_dtype=wide, low_cpu_mem_usage=name == "third")
        types = {p.dtype for key, p in model.named_parameters() if f".{name}." in key}
        assert types == {expected}
    outputs(model, tokens(), sequence_embeds=users(dtype=dtype))


# ---- tasks, messages, names


def encoder(task):
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=50, **HEADS, intermediate_size=64, num_labels=2)
    return TASKS[task].from_config(shape).double().eval()


TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_models_that_do_not_generate(task, per_layer, tmp_path):
    def result(model, **kwargs):
        return next(iter(model(tokens(), **kwargs).values()))

    options = {"target_modules": ["query", "value"], "gate_per_layer": per_layer}
    with pytest.raises(UserError, match=f"set task_type in ILoraConfig .*Bert.*{task}"):
        get_peft_model(encoder(task), config(**options))
    torch.manual_seed(1)
    model = get_peft_model(encoder(task), config(task_type=task, **options)).eval()
    together = result(model, sequence_embeds=users())
    with torch.no_grad():
        stock = result(encoder(task))
    assert together.shape == stock.shape and (together - stock).abs().max() > 1e-4
    with torch.no_grad():
        flipped = result(model, sequence_embeds=users().flip(0))
    assert (flipped - together).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(encoder(task), tmp_path).eval()
    assert_close(result(loaded, sequence_embeds=users()), together)
    with pytest.raises(UserError, match="pass sequence_embeds=z"):
        model(tokens())


def t5():
    torch.manual_seed(0)
    shape = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(shape).double().eval()


def test_encoder_decoder():
    options = {"target_modules": ["q", "v", "wi", "wo"]}
    with pytest.raises(UserError, match=r"set task_type in ILoraConfig .*T5.*: CAUSAL_LM or SEQ_2_SEQ_LM"):
        get_peft_model(t5(), config(task_type=None, **options))
    model = get_peft_model(t5(), config(task_type="SEQ_2_SEQ_LM", **options)).eval()
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(input_ids=tokens(), sequence_embeds=users(), **kwargs)
    for row in range(BATCH):
        one = model.generate(input_ids=tokens()[[row]], sequence_embeds=users()[[row]], **kwargs)
        assert torch.equal(together[[row], : one.shape[1]], one)
    for several in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(UserError, match="one sequence per prompt"):
            model.generate(input_ids=tokens(), sequence_embeds=users(), **{**kwargs, **several})


WRONG = {
    "list": (lambda z: z.tolist(), r"floating-point tensor of shape \(batch, .*not list.*torch.as_tensor"),
    "array": (lambda z: z.numpy(), "not ndarray"),
    "integers": (lambda z: z.long(), "not torch.int64"),
    "booleans": (lambda z: z > 0, "not torch.bool"),
    "one row": (lambda z: z[0], rf"not \({D},\)"),
    "three dimensions": (lambda z: z[None], rf"not \(1, {BATCH}, {D}\)"),
    "narrow": (lambda z: z[:, 1:], rf"shape \(batch, {D}\), not \({BATCH}, {D - 1}\)"),
}


@gated
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_representations_are_named(kind, wrong):
    model, (make, message) = wrapped(kind), WRONG[wrong]
    z = make(users())

    def inside():
        with model.sequence_embeds(z):
            model(tokens())

    for call in (
        lambda: model(tokens(), sequence_embeds=z),
        lambda: model.generate(tokens(), sequence_embeds=z, max_new_tokens=1),
        lambda: gate_weights(model, z),
        inside,
    ):
        with pytest.raises(UserError, match=message):
            call()


@gated
def test_representations_that_are_not_finite(kind, tmp_path):
    model = wrapped(kind)
    for value in (np.nan, np.inf):
        z = users().clone()
        z[0, 0] = value
        with pytest.raises(UserError, match="sequence_embeds has values that are not finite"):
            model(tokens(), sequence_embeds=z)
        with pytest.raises(UserError, match="not finite"):
            model.generate(tokens(), sequence_embeds=z, max_new_tokens=1)
        with pytest.raises(UserError, match="not finite"):
            export_lora(model, z[:1], tmp_path)
        with pytest.raises(UserError, match="not finite"), model.sequence_embeds(z[:1]):
            model.merge_adapter()
        assert outputs(model, tokens(), sequence_embeds=users()).isfinite().all()
    assert not any(tmp_path.iterdir())


def test_finite_representations_may_have_a_sum_that_half_precision_has_not():
    z = torch.full((2000, 64), 1.0, dtype=torch.float16)
    assert z.sum().isinf()
    with wrapped("shared gate").sequence_embeds(z):
        pass


def test_unknown_adapters_and_other_models_are_named(tmp_path):
    model = adapted()
    model.add_adapter("second", config())
    for call in (
        lambda **kw: gate_weights(model, users(), **kw),
        lambda **kw: export_lora(model, users(1), tmp_path, **kw),
    ):
        with pytest.raises(UserError, match=r"'third'.*name one of default, second"):
            call(adapter_name="third")
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(UserError, match="name one of default, second"):
            call()
        model.set_adapter("second")
        call()
    with pytest.raises(ValueError, match="third"):
        model.set_adapter("third")
    stock = get_peft_model(base(), lora())
    for other in (stock, base()):
        with pytest.raises(UserError, match="no iLoRA adapter"):
            gate_weights(other, users())


def test_the_type_prints_like_pefts():
    for spell in (str, repr, format, lambda t: f"{t:>20}", lambda t: t.value, lambda t: t.name):
        assert spell(ILORA) == spell(PeftType.LORA).replace("LORA", "ILORA")[-max(20, len(spell(ILORA))) :]
    assert ILORA == "ILORA"
    assert adapted().get_model_status().peft_types == {"default": "ILORA"}


# ---- conditions of threads and tasks, compiled layers


def test_interleaved_asyncio_tasks_are_refused():
    """Two tasks that wait inside their contexts: none gets the other's users."""
    model = adapted()

    async def serve(seed):
        with model.sequence_embeds(users(seed=seed)):
            await asyncio.sleep(0.01)
            return outputs(model, tokens())

    async def both():
        return await asyncio.gather(serve(1), serve(2), return_exceptions=True)

    first, second = asyncio.run(both())
    assert torch.equal(first, outputs(model, tokens(), sequence_embeds=users(seed=1)))
    assert isinstance(second, UserError) and "asyncio" in str(second)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.slow
def test_layers_compiled_each_compile_once(per_layer):
    """Training with new users in every step: no graph break, no compilation after the first step, same gradients."""
    torch._dynamo.reset()
    counters.clear()
    options = {"gate_per_layer": per_layer, "target_modules": ["q_proj", "down_proj"]}
    eager, model, counter = adapted(**options).train(), adapted(**options).train(), CompileCounter()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=False)
    compiled = []
    for step in range(3):
        ids, z = tokens(seed=step), users(seed=step)
        assert_same_gradients(gradients(model, z, ids), gradients(eager, z, ids))
        compiled.append(counter.frame_count)
    assert compiled == [2, 2, 2]  # the second layer's input has a gradient, the first's has none
    assert not counters["graph_break"]

    results = {}

    def serve(seed):
        results[seed] = outputs(model.eval(), tokens(), sequence_embeds=users(seed=seed))

    in_threads([partial(serve, seed) for seed in range(3)])
    assert len(results) == 3
    for seed, result in results.items():
        assert_close(result, outputs(eager.eval(), tokens(), sequence_embeds=users(seed=seed)))
