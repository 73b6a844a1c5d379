"""Greedy writing with drafts, against `generate`, token for token."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, MistralConfig, cache_utils

from ilora.adapter import ILoraConfig
from ilora.model import TARGET_MODULES
from ilora.writing import write

SMALL = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ROWS, PROMPT, LONGEST = 6, 9, 8
GPT2 = GPT2Config(
    vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=PROMPT + LONGEST, initializer_range=0.3
)  # no place for padding behind the longest
LORA = {"r": 8, "lora_alpha": 32, "target_modules": TARGET_MODULES}
KINDS = {  # name -> configuration of the base, and of its adapter
    "llama": (LlamaConfig(**SMALL), None),
    "mistral": (MistralConfig(**SMALL), None),
    "mistral, short window": (MistralConfig(**SMALL, sliding_window=7), None),  # no draft: holes would count in it
    "gpt2": (GPT2, None),
    "lora": (LlamaConfig(**SMALL), LoraConfig(task_type="CAUSAL_LM", **LORA)),
    "ilora": (LlamaConfig(**SMALL), ILoraConfig(**LORA)),
    "ilora, gpt2": (GPT2, ILoraConfig(r=8, lora_alpha=32, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gate of each layer": (MistralConfig(**SMALL), ILoraConfig(**LORA, gate_per_layer=True)),
    "top 2": (LlamaConfig(**SMALL), ILoraConfig(**LORA, gate_top_k=2)),
    "convolutional": (LlamaConfig(**SMALL), ILoraConfig(**LORA, gate="convolutional")),
}


def make(kind, **changes):
    """A tiny float64 model with random weights, all of which matter, that never ends by itself."""
    base, adapter = deepcopy(KINDS[kind])
    base.update(changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base)
    model = get_peft_model(model, adapter) if adapter else model
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model.double().eval()


@pytest.fixture(params=KINDS)
def model(request):
    return make(request.param)


def prompts(model):
    """Embeddings, mask and guidance of prompts of unlike length."""
    ids = torch.randint(50, (ROWS, PROMPT), generator=torch.manual_seed(1))
    mask = (torch.arange(PROMPT) >= torch.arange(ROWS)[:, None]).long()
    z = torch.randn(ROWS, 64, generator=torch.manual_seed(2)).to(model.dtype)
    gated = isinstance(getattr(model, "active_peft_config", None), ILoraConfig)
    return model.get_input_embeddings()(ids).detach(), mask, {"sequence_embeds": z} if gated else {}


def usual(model, limits):
    """What `generate` writes, each row as far as its limit and its end."""
    embeds, mask, guidance = prompts(model)
    found = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=0,
        repetition_penalty=1.0, **guidance,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    rows = [tokens[:limit] for tokens, limit in zip(found.tolist(), limits, strict=True)]
    return [row[: next((place + 1 for place, token in enumerate(row) if token in ends), None)] for row in rows]


def written(model, offered):
    """What `write` gives, and how many rows and tokens each forward pass read."""
    embeds, mask, guidance = prompts(model)
    read, decoder = [], model.get_decoder()

    def count(_, args, given):
        ids = args[0] if args else given.get("input_ids")
        read.append(tuple((given["inputs_embeds"] if ids is None else ids).shape[:2]))

    hook = decoder.register_forward_pre_hook(count, with_kwargs=True)
    found = write(model, embeds, mask, offered, **guidance)
    hook.remove()
    return found, read


def agrees(model, offered):
    """Holds what is written against `generate`; what each forward pass read."""
    found, read = written(model, offered)
    assert found == usual(model, [1 + max(map(len, answers)) for answers in offered])
    assert read[0] == (ROWS, PROMPT)
    return read


def drafts(model):
    return getattr(model.config, "sliding_window", None) != 7


def other(tokens):
    return [(token + 1) % 50 for token in tokens]


# ---------------------------------------------------------------- what it writes


def test_answers_that_were_offered_take_two_passes(model):
    own = usual(model, [LONGEST] * ROWS)
    assert len({tuple(tokens) for tokens in own}) == ROWS
    answers = [tokens[: 4 + row % 4] for row, tokens in enumerate(own)]  # of unlike length
    read = agrees(model, [[other(answer), answer, answer[:1]] for answer in answers])
    assert len(read) == (2 if drafts(model) else LONGEST)
    assert not drafts(model) or read[1] == (ROWS, 7)


def test_answers_that_were_not_offered_are_written_token_by_token(model):
    own = usual(model, [LONGEST] * ROWS)
    read = agrees(model, [[other(tokens[:5]), other(tokens[:3])] for tokens in own])
    assert read[1:] == [(ROWS, 1)] * 5


def test_drafts_are_rejected_where_answers_part(model):
    """One after the other, so that what was rejected stands in the middle of what is read."""
    own = usual(model, [LONGEST] * ROWS)
    parts = [[tokens[:at] + other(tokens[at:-1]) for at in (1, 3, 4 + row % 2)] for row, tokens in enumerate(own)]
    read = agrees(model, [[*offers, tokens[:-1]] for offers, tokens in zip(parts, own, strict=True)])
    if drafts(model):  # written after them: 1, 2, 4, 5 or 6, and all
        assert read[1:] == [(ROWS, 7), (ROWS, 6), (ROWS, 4), (ROWS, 3)]


def test_rows_that_end_early_are_read_no_more(model):
    """Row 0 by the end token, odd rows by what was offered."""
    own = usual(model, [LONGEST] * ROWS)
    model.generation_config.eos_token_id = own[0][3]
    assert len(usual(model, [LONGEST] * ROWS)[0]) <= 4
    offered = [[tokens[:2]] if row % 2 else [other(tokens[:6])] for row, tokens in enumerate(own)]
    read = agrees(model, offered)
    rows = [rows for rows, _ in read]
    assert len(read) == 7 and rows == sorted(rows, reverse=True)
    assert rows[-1] <= ROWS // 2 - 1 and rows[1] > ROWS // 2


def test_any_of_the_models_ends_ends_a_row(model):
    own = usual(model, [LONGEST] * ROWS)
    ends = [own[0][2], own[1][4]]
    offered = [[tokens[:-1]] for tokens in own]  # the ends are within the drafts
    for end in (ends, ends[0], None):
        model.generation_config.eos_token_id = end
        agrees(model, offered)
    model.generation_config.eos_token_id = ends
    found, _ = written(model, offered)
    assert [len(tokens) for tokens in found] != [LONGEST] * ROWS
    assert all(not {*tokens[:-1]} & {*ends} for tokens in found)


def test_limits_are_the_rows_own(model):
    own = usual(model, [LONGEST] * ROWS)
    agrees(model, [[tokens[:1]] if row else [tokens[:-1]] for row, tokens in enumerate(own)])
    found, read = written(model, [[[]]] * ROWS)
    assert found == [tokens[:1] for tokens in own] and len(read) == 1


def test_padding_is_within_the_places_that_the_model_has():
    """Row 0 has few places left when others still read long drafts."""
    model = make("gpt2")
    own = usual(model, [LONGEST] * ROWS)
    wrong = [tokens[:at] + other(tokens[at:-1]) for tokens, at in zip(own, (6, *[1] * (ROWS - 1)), strict=True)]
    read = agrees(model, [[one, tokens[:-1]] for one, tokens in zip(wrong, own, strict=True)])
    assert read[1:] == [(ROWS, 7), (ROWS, 7 - 1)]


# ---------------------------------------------------------------- what must not matter


def test_the_models_own_ways_to_write_do_not_matter():
    model = make("ilora")
    offered = [[tokens[:-1]] for tokens in usual(model, [LONGEST] * ROWS)]
    expected, _ = written(model, offered)
    own = {"repetition_penalty": 50.0, "do_sample": True, "temperature": 9.0, "num_beams": 3, "no_repeat_ngram_size": 1}
    model.generation_config.update(**own, min_new_tokens=20)
    assert written(model, offered)[0] == expected


def test_all_of_a_window_may_be_drafted_and_no_more():
    """A window as long as all that could be read, with what is rejected, is none."""
    for window, passes in ((PROMPT + LONGEST**2, 2), (PROMPT + LONGEST**2 - 1, LONGEST)):
        model = make("mistral", sliding_window=window)
        assert len(agrees(model, [[tokens[:-1]] for tokens in usual(model, [LONGEST] * ROWS)])) == passes


def test_no_draft_where_a_layer_keeps_more_than_keys_and_values(monkeypatch):
    class Other(cache_utils.DynamicLayer):
        pass

    model = make("llama")
    offered = [[tokens[:-1]] for tokens in usual(model, [LONGEST] * ROWS)]
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Other)
    assert len(agrees(model, offered)) == LONGEST


def test_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the quantised base is not tried")
    make("llama").float().save_pretrained(tmp_path)
    kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "cpu"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs), ILoraConfig(**LORA)).eval()
    assert len(agrees(model, [[tokens[:-1]] for tokens in usual(model, [LONGEST] * ROWS)])) == 2
