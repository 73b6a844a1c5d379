"""Every family of causal language models trains, and scores and writes as its plain forward pass says."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ilora.data.world import titles
from ilora.errors import UserError
from ilora.language import LanguageRecommender, Prompts, adapter_config, load_language_model, wording
from ilora.language.ranking import long_question
from ilora.recommenders import SASRec

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
    "Falcon with alibi": (
        WIDE | {"alibi": True},
        False,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "GPTNeo": (  # local attention by places, not by positions
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["local", "global"], 1]],
            "window_size": 16,
        },
        False,
        {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"},
    ),
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
    config = getattr(transformers, f"{family.split()[0]}Config")
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    made = config(**tokens | FAMILIES[family][0] | changes)
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
    tokens, items = model.prompts.write(*row[:2], hybrid=True), iter([*row[0], *row[1]])
    embedding, is_item = model.language_model.get_input_embeddings(), model.prompts.item_token
    embeds = [
        model.projector(model.encoder.items.weight[next(items)]) if token == is_item else embedding(torch.tensor(token))
        for token in [*tokens, *answer]
    ]
    z = {"sequence_embeds": model.encoder.encode(model.encoder.stack([row[0]]))} if model.gated else {}
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
@pytest.mark.slow
def test_a_family_trains_scores_and_writes_as_its_forward_pass_says(family, experts, tokenizer, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="ilora"):
        model, rows = recommender(family, tokenizer, experts), some_rows()
    _, packs, names = FAMILIES[family]
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == names
    assert all(name in caplog.text for name in names)
    left = {"OPT": "fc1, fc2", "Mixtral": "down_proj, gate, gate_up_proj", "Mamba": "dt_proj, out_proj"}.get(family, "")
    (record,) = (record for record in caplog.records if record.name == "ilora.language.adapted_layers")
    assert record.levelname == ("WARNING" if left else "INFO")
    assert record.message.rpartition("; not on ")[2] == left if left else "; not on" not in record.message

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
    torch.testing.assert_close(model.score(rows), expected, rtol=1e-4, atol=1e-3)
    assert expected.std(1).min() > 0.1
    assert model.packs == packs, caplog.text

    written = []
    monkeypatch.setattr(model.prompts, "read", lambda tokens: written.append(tokens.tolist()) or "")
    model.generate(rows)
    for row, tokens in zip(rows, written, strict=True):
        plain = greedy(model, row)
        assert tokens[: len(plain)] == plain and set(tokens[len(plain) :]) <= {model.prompts.end}


@pytest.mark.parametrize(
    ("family", "changes", "least", "most"),
    [
        ("Llama", {}, 300, 400),
        ("Mistral", {"sliding_window": 600}, 650, 750),
        ("Mistral", {"sliding_window": 4096}, 300, 400),  # too long to try out on a CPU
        ("GPT2", {"n_positions": 200}, 120, 200),
    ],
)
def test_one_pass_is_tried_on_a_prompt_longer_than_a_window_and_within_the_positions(
    family, changes, least, most, tokenizer
):
    model = recommender(family, tokenizer, **changes).eval()
    assert least < model.length(long_question(model)) <= most
    assert model.packs


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("family", "wanted", "adapted"),
    [
        ("Llama", ["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("Llama", r".*layers\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        ("GPT2", ["c_attn"], {"c_attn"}),
        ("GPT2", "ALL-LINEAR", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_target_modules_are_a_setting(family, wanted, adapted, tokenizer):
    prompts = Prompts(tokenizer, TITLES, "story", "read")
    adapter = adapter_config(experts=1, target_modules=wanted)
    model = LanguageRecommender(base(family, tokenizer), prompts, None, adapter)
    layers = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert layers == adapted
    assert adapter.target_modules == (
        wanted if isinstance(wanted, str) else set(wanted)
    )  # the caller's configuration is unchanged


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("experts", [1, 4])
def test_a_base_that_carries_an_adapter_is_refused_until_it_is_unloaded(family, experts, tokenizer):
    prompts, encoder = Prompts(tokenizer, TITLES, "story", "read"), SASRec(len(TITLES), dim=64)
    shared = base(family, tokenizer)
    first = LanguageRecommender(shared, prompts, encoder, adapter_config(experts=experts))
    with pytest.raises(UserError, match="carries an adapter already: load the base model again"):
        LanguageRecommender(shared, prompts, encoder, adapter_config(experts=4))
    again = LanguageRecommender(first.language_model.unload(), prompts, encoder, adapter_config(experts=4))
    assert again(again.collate(some_rows())).isfinite()


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("OPT", ["q_proj", "fc1"], "means fc1 in OPTForCausalLM"),
        ("Mamba", ["in_proj", "out_proj"], "means out_proj in MambaForCausalLM"),
        ("Phi3", ["q_proj", "k_proj"], "Phi3ForCausalLM has no target module 'k_proj'.*qkv_proj"),
        ("Mixtral", ["gate_up_proj"], "means gate_up_proj in MixtralForCausalLM.*q_proj"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(family, wanted, message, experts, tokenizer):
    prompts, encoder = Prompts(tokenizer, TITLES, "story", "read"), SASRec(len(TITLES), dim=64)
    with pytest.raises(UserError, match=message):
        LanguageRecommender(
            base(family, tokenizer), prompts, encoder, adapter_config(experts=experts, target_modules=wanted)
        )


@pytest.mark.parametrize("experts", [1, 4])
def test_a_model_that_peft_gives_no_embeddings_is_refused(experts, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        transformers.MptConfig(vocab_size=len(tokenizer), d_model=32, n_layers=1, n_heads=4)
    )
    prompts, encoder = Prompts(tokenizer, TITLES, "story", "read"), SASRec(len(TITLES), dim=64)
    with pytest.raises(UserError, match="PEFT passes no embeddings to MptForCausalLM"):
        LanguageRecommender(model, prompts, encoder, adapter_config(experts=experts))


# ---------------------------------------------------------------- the placeholder


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GPT2"])  # with an untied, a scaled and a tied embedding
def test_a_base_without_the_item_token_is_left_as_it_is(family, tokenizer):
    before = {name: value.clone() for name, value in base(family, tokenizer).state_dict().items()}
    model = recommender(family, tokenizer, experts=1)
    inner = model.language_model.get_base_model()
    assert inner.get_input_embeddings().weight.shape[0] == inner.config.vocab_size == len(tokenizer)
    frozen = {
        name.replace(".base_layer", ""): value for name, value in inner.state_dict().items() if "lora" not in name
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    used = torch.tensor(sorted({token for title in model.prompts.answers for token in title}))
    torch.testing.assert_close(model.placeholder, inner.get_input_embeddings()(used).mean(0))
    batch = model.batch(some_rows(), [[row[2]] for row in some_rows()])
    is_item = batch["input_ids"] == model.prompts.item_token
    text = model.embeds(batch, hybrid=False)
    assert (text[is_item] == model.placeholder).all()
    assert torch.equal(text[~is_item], inner.get_input_embeddings()(batch["input_ids"][~is_item]))
    assert (model.projector(model.encoder.item_embeddings) - model.placeholder).abs().mean() < model.placeholder.std()


def test_an_adapter_comes_back_around_a_base_without_the_item_token(tokenizer, tmp_path):
    plain = base("GPT2", tokenizer)
    plain.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, rows = recommender("GPT2", tokenizer, experts=4), some_rows()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path / "kept", str(tmp_path / "base"))
    again = LanguageRecommender.from_pretrained(tmp_path / "kept", device="cpu")
    torch.testing.assert_close(again.score(rows), model.score(rows), rtol=0, atol=0)
    assert again.generate(rows) == model.generate(rows)


def test_an_adapter_of_another_base_is_refused(tokenizer, tmp_path):
    for family, changes in (("GPT2", {}), ("Llama", {}), ("Qwen3", {"hidden_size": 64})):
        base(family, tokenizer, **changes).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    recommender("GPT2", tokenizer).save_pretrained(tmp_path / "kept", str(tmp_path / "GPT2"))
    for other in ("Llama", "Qwen3"):
        with pytest.raises(UserError, match=rf"does not fit .*{other}.*: name the base model .*GPT2"):
            LanguageRecommender.from_pretrained(tmp_path / "kept", str(tmp_path / other), device="cpu")


# ---------------------------------------------------------------- what is refused before any work


@pytest.mark.parametrize(
    ("family", "limit"),
    [("Llama", "max_position_embeddings"), ("GPT2", "n_positions"), ("OPT", "max_position_embeddings")],
)
def test_a_prompt_beyond_the_models_positions_is_refused(family, limit, tokenizer):
    rows = some_rows()
    model = recommender(family, tokenizer, **{limit: 512})
    longest = max(map(model.length, rows)) + model.prompts.longest
    for positions, fits in ((longest, True), (longest - 1, False)):
        model = recommender(family, tokenizer, **{limit: positions}).eval()
        for work in (model.check, model.generate, model.score, lambda rows, model=model: model(model.collate(rows))):
            if fits:
                work(rows)
            else:
                with pytest.raises(UserError, match=f"up to {longest} tokens, but the base model reads {longest - 1}"):
                    work(rows)


def test_a_models_padding_token_does_not_matter(tokenizer):
    """[PAD] is often added to a tokenizer without a row for it in the model."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert other.pad_token_id == len(tokenizer)
    prompts, rows = Prompts(other, TITLES, "story", "read"), some_rows()
    model = LanguageRecommender(base("Llama", tokenizer), prompts).eval()
    plain = LanguageRecommender(base("Llama", tokenizer), Prompts(tokenizer, TITLES, "story", "read")).eval()
    torch.testing.assert_close(model.score(rows), plain.score(rows))
    assert model.generate(rows) == plain.generate(rows)


def small(kind, tokenizer, **config):
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **config)
    return getattr(transformers, config.pop("model", f"{kind}Model"))(made)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda t: small("Llama", t, **LLAMA), "no language model head"),
        (lambda t: transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=len(t), **WIDE)), "is not causal"),
        (lambda t: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(t), **WIDE)), "is not causal"),
        (
            lambda t: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=len(t), d_model=32, num_heads=4, num_layers=1, d_ff=48, d_kv=8)
            ),
            "encoder-decoder",
        ),
        (
            lambda t: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **LLAMA)),
            "writes token .* has 100",
        ),
    ],
    ids=["no head", "BERT with a head", "masked", "T5", "another tokenizer"],
)
def test_a_model_that_is_no_causal_language_model_is_refused(model, message, tokenizer):
    with pytest.raises(UserError, match=message):
        LanguageRecommender(model(tokenizer), Prompts(tokenizer, TITLES, "story", "read"))


@pytest.mark.parametrize("kind", ["no head", "T5", "BART", "remote code", "pickled", "damaged"])
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(kind, tokenizer, tmp_path):
    if kind == "no head":
        small("Llama", tokenizer, **LLAMA).save_pretrained(tmp_path)
    elif kind == "T5":
        small("T5", tokenizer, d_model=32, num_heads=4, num_layers=1, d_ff=48, d_kv=8).save_pretrained(tmp_path)
    elif kind == "BART":
        small(
            "Bart", tokenizer, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        ).save_pretrained(tmp_path)  # fmt: skip
    elif kind == "remote code":
        names = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.OwnForCausalLM"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": names}))
    else:
        base("Llama", tokenizer).save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        if kind == "pickled":
            weights.rename(tmp_path / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)
    reason = {"no head": "no trained lm_head.weight", "T5": "encoder-decoder", "BART": "encoder-decoder"}
    reason |= {"remote code": "code from its repository", "pickled": "safetensors", "damaged": ""}
    with pytest.raises(UserError, match=rf"could not be loaded \(.*{reason[kind]}.*\): name a causal") as caught:
        load_language_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_writing_is_greedy_whatever_the_models_defaults_are(tokenizer):
    model, rows = recommender("Llama", tokenizer).eval(), some_rows()
    inner, expected = model.language_model.get_base_model(), model.generate(rows)
    changes = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 50.0, "min_new_tokens": 3}
    inner.generation_config = defaults = transformers.GenerationConfig(
        **changes, suppress_tokens=[1, 2], eos_token_id=[0]
    )
    assert model.generate(rows) == expected
    assert inner.generation_config is defaults
