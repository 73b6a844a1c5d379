"""iLoRA over bases that bitsandbytes has quantised.  Run by test_tuning.py, where `make test` has installed it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_adapter import BATCH, HEADS, SMALL, assert_close, config, gradients, outputs, tokens, users
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from ilora import data, language
from ilora.adapter import export_lora
from ilora.language import AdapterSettings, tuning_arguments
from ilora.language.pretraining import EMBEDDED
from ilora.recommenders import fit_recommender


@pytest.mark.parametrize(("option", "near"), [("load_in_8bit", 2e-2), ("load_in_4bit", 2e-3)])
def test_quantised_base(option, near, tmp_path):
    """`near`: how much two ways to one result differ in the quantised arithmetic."""
    wide = LlamaConfig(**{**SMALL, **HEADS, "hidden_size": 128}, intermediate_size=128)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "base")  # blocks of 64 weights

    def quantised():
        kwargs = {"quantization_config": BitsAndBytesConfig(**{option: True}), "device_map": "cpu"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **kwargs)

    torch.manual_seed(1)
    model = get_peft_model(quantised(), config()).eval()
    ids, z = tokens(), users(dtype=torch.float32)
    together = outputs(model, ids, sequence_embeds=z)
    alone = torch.cat([outputs(model, i, sequence_embeds=u) for i, u in zip(ids.split(1), z.split(1), strict=True)])
    assert_close(together, alone, near)
    assert (outputs(model, ids, sequence_embeds=z.flip(0)) - together).abs().max() > 10 * near  # users matter
    assert set(gradients(model, z)) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
    assert_close(outputs(loaded, ids, sequence_embeds=z), together)
    generated = model.generate(ids, sequence_embeds=z, max_new_tokens=2, num_beams=2, do_sample=False)
    assert generated.shape == (BATCH, ids.shape[1] + 2)
    export_lora(model, z[:1], tmp_path / "lora")
    lora = PeftModel.from_pretrained(quantised(), tmp_path / "lora").eval()
    assert_close(outputs(lora, ids[:1]), alone[:1], near)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantised_base_is_tuned_and_loaded_again(tmp_path, monkeypatch, quantize):
    monkeypatch.setenv("ILORA_HOME", str(tmp_path))
    world = data.load("world", users=60)
    shape = AutoConfig.from_pretrained(EMBEDDED)
    shape.intermediate_size = 128  # whole blocks of 64 weights
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "base")
    encoder, _ = fit_recommender(world, epochs=1, window=6, device="cpu")
    arguments = tuning_arguments(batch_size=8, device="cpu", gradient_checkpointing=True)
    more = {"base_model": str(tmp_path / "base"), "train_limit": 16, "quantize": quantize}
    model, history, files = language.tune(world, encoder, AdapterSettings(experts=4), arguments, **more)
    assert getattr(model.language_model, f"is_loaded_in_{quantize}") and history["loss"].notna().all()
    rows = [data.questions(world, "test", 6)[row] for row in range(3)]
    ranked, written = model.score(rows), model.generate(rows)
    again, _, _ = language.tune(world, encoder, AdapterSettings(experts=4), arguments, **more)
    assert getattr(again.language_model, f"is_loaded_in_{quantize}")
    torch.testing.assert_close(again.score(rows), ranked, rtol=0, atol=0)
    assert again.generate(rows) == written
    del more["quantize"]
    assert language.tune(world, encoder, AdapterSettings(experts=4), arguments, **more)[2] != files
