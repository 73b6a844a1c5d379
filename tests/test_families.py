"""Every family of causal language models trains, and ranks and writes as its plain forward pass says."""

import logging

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ilora import language_model
from ilora.model import LanguageRecommender, adapter_config
from ilora.prompts import NO_ITEM, Prompts, wording
from ilora.recommenders import SASRec
from ilora.world import titles

TITLES = list(titles()["title"][:40])
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = WIDE | {"num_key_value_heads": 2, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
TYPES = ["sliding_attention", "full_attention"]
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FAMILIES = {  # name -> configuration, whether it reads all candidates in one pass, last names of the adapted layers
    "Llama": (LLAMA, True, PROJECTIONS),
    "Mistral": (LLAMA | {"sliding_window": 16}, True, PROJECTIONS),  # far shorter than a prompt
    "Gemma3Text": (LLAMA | {"sliding_window": 16, "layer_types": TYPES, "head_dim": 8}, True, PROJECTIONS),
    "Qwen2": (
        LLAMA | {"use_sliding_window": True, "sliding_window": 16, "layer_types": TYPES, "max_window_layers": 1},
        True,
        PROJECTIONS,
    ),
    "Qwen3": (LLAMA | {"head_dim": 8}, True, PROJECTIONS),
    "Phi3": (LLAMA | {"sliding_window": 40}, True, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "GPT2": (GPT2, True, {"c_attn", "c_proj", "c_fc"}),
    "GPTNeoX": (
        WIDE | {"intermediate_size": 48},
        True,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "OPT": (WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, True, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Falcon": (WIDE, True, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "Bloom": (GPT2, False, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "Mixtral": (LLAMA | {"num_local_experts": 3}, True, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "Mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False, {"in_proj", "x_proj"}),
}


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE without padding, unknown or item token, in the manner of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TITLES, *wording("story", "read")] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def base(family, tokenizer, **changes):
    config = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    made = config(
        vocab_size=len(tokenizer), **FAMILIES[family][0] | changes, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # a random model hardly looks at what it reads
        if parameter.dim() > 1 and "embed" not in name and "wte" not in name and "A_log" not in name:
            parameter *= 4
    return model


def recommender(family, tokenizer, experts=4, **changes):
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    torch.manual_seed(1)
    encoder = SASRec(len(TITLES), dim=16, window=5)
    torch.nn.init.normal_(encoder.items.weight, std=0.3)
    config = adapter_config(experts=experts, dropout=0.0, **{"gate_dim": 16} if experts > 1 else {})
    return LanguageRecommender(base(family, tokenizer, **changes), prompts, encoder, config)


def some_rows(lengths=(2, 5, 3), offered=4):
    rng, rows = np.random.default_rng(0), []
    for length in lengths:
        items = rng.permutation(len(TITLES))
        rows.append((items[:length], items[length : length + offered], int(items[length])))
    return rows


@torch.no_grad()
def plain_logits(model, row, answer=()):
    """(tokens, vocabulary) of a prompt and tokens after it: one row, no padding, mask, positions or cache."""
    tokens, owners = model.prompts.write(*row[:2], behaviour=True)
    table = model.language_model.get_input_embeddings()
    embeds = [
        table(torch.tensor(token)) if owner == NO_ITEM else model.projector(model.encoder.items.weight[owner])
        for token, owner in zip([*tokens, *answer], owners + [NO_ITEM] * len(answer), strict=True)
    ]
    z = {"sequence_embeds": model.encoder.encode(model.encoder.pad([row[0]]))} if model.gated else {}
    return model.language_model(inputs_embeds=torch.stack(embeds)[None], use_cache=False, **z).logits[0]


def plain_score(model, row, item):
    answer = [*model.prompts.answers[item], model.prompts.end]
    logits = plain_logits(model, row, answer[:-1]).log_softmax(-1)[-len(answer) :]
    return logits[range(len(answer)), answer].sum()


def greedy(model, row):
    """The tokens that a plain loop writes."""
    written = []
    for _ in range(1 + max(len(model.prompts.answers[item]) for item in row[1])):
        written.append(int(plain_logits(model, row, written)[-1].argmax()))
        if written[-1] == model.prompts.end:
            break
    return written


@pytest.mark.parametrize("experts", [1, 4], ids=["LoRA", "iLoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_ranks_and_writes_as_its_forward_pass_says(family, experts, tokenizer, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="ilora"):
        model, rows = recommender(family, tokenizer, experts), some_rows()
    _, packs, names = FAMILIES[family]
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == names
    assert all(name in caplog.text for name in names)

    model.train()  # two steps: B, which starts from zero, and then A
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    before = {name: value.clone() for name, value in model.trainable_state().items()}
    for _ in range(2):
        loss = model(model.collate(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    moved = {name for name, value in model.trainable_state().items() if not torch.equal(value, before[name])}
    assert moved == set(before)
    model.eval()

    expected = torch.stack([torch.stack([plain_score(model, row, item) for item in row[1]]) for row in rows])
    loss = model(model.collate(rows))
    torch.testing.assert_close(loss, -expected[:, 0].mean(), rtol=1e-4, atol=1e-4)  # the target is the first candidate
    scores, greedily = model._candidates(rows)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
    assert expected.std(1).min() > 0.1
    assert model.packs == packs, caplog.text
    assert not greedily.any() or family  # nothing to compare with: random models name no title

    written = []
    monkeypatch.setattr(model, "_column", lambda row, tokens: written.append([int(t) for t in tokens]))
    model.generate(rows)
    for row, tokens in zip(rows, written, strict=True):
        own = greedy(model, row)
        assert tokens[: len(own)] == own and set(tokens[len(own) :]) <= {model.prompts.end}
