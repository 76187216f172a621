"""LoRA of PEFT around a prepared or converted model, and under one."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers

from diffq_fx import ConversionError, DiffQConfig, DiffQWarning, ExportError, convert, prepare, prepare_diffq
from diffq_fx.export import export_onnx
from diffq_fx.methods import LSQ, STE

IDS = {"input_ids": torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(0))}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def with_lora(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # it starts with zeros, which do nothing
    return adapted


def run(model):
    with torch.no_grad():
        return model.eval()(**IDS).logits


def train(model, steps=3):
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), 1e-2)
    for _ in range(steps):
        model.train()(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_under_a_prepared_model_stay_in_float():
    model = prepare(with_lora(llama()), IDS, STE(bits=4))
    assert not [q.spec.name for q in model.compression.quantizers if "lora_" in q.spec.name]
    assert {s.reason for s in model.compression.skipped if "lora_" in s.name} == {"a PEFT adapter"}
    train(model)
    expected = run(model)
    converted = convert(model)
    assert torch.equal(run(converted), expected)
    assert len([name for name, _ in converted.named_parameters() if "lora_" in name]) == 4


def test_integers_and_adapters_are_saved_apart(tmp_path):
    converted = convert(prepare(with_lora(llama()), IDS, STE(bits=4)))
    expected = run(converted)
    with pytest.raises(
        ExportError, match=r"the PeftModelForCausalLM has no cache: .* Export its get_base_model\(\), which has the adapters"
    ):
        export_onnx(converted, {"input_ids": IDS["input_ids"]}, tmp_path / "model.onnx", cache=True)
    converted.save_pretrained(tmp_path / "adapters")
    converted.unload().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(run(peft.PeftModel.from_pretrained(base, tmp_path / "adapters")), expected)


def test_an_unmerged_adapter_around_a_prepared_model_is_converted_with_it():
    model = with_lora(prepare(llama(), IDS, STE(bits=4)))
    train(model)
    expected = run(model)
    converted = convert(model)
    assert torch.equal(run(converted), expected)
    assert converted.peft_config


def test_a_merged_adapter_is_in_the_integers():
    prepared = prepare(llama(), IDS, STE(bits=8))
    before = run(prepared)
    merged = with_lora(prepared).merge_and_unload()
    assert not torch.equal(run(merged), before)
    assert torch.equal(run(convert(merged)), run(merged))


def test_merging_inside_a_prepared_model_says_what_to_convert():
    model = prepare(with_lora(llama()), IDS, STE(bits=4))
    merged = model.merge_and_unload()
    with pytest.raises(ConversionError, match="Give the whole, as prepare returned it; what was merged"):
        convert(merged)
    assert torch.equal(run(convert(model)), run(model))


def test_lora_on_a_converted_model_trains():
    converted = convert(prepare(llama(), IDS, STE(bits=4)))
    model = with_lora(converted)
    before = run(model)
    train(model)
    assert not torch.equal(run(model), before)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_the_bits_are_learned_beside_an_adapter():
    model = prepare_diffq(with_lora(llama()), IDS, DiffQConfig(target_bits=5, training_steps=4))
    train(model, steps=4)
    assert model.compression.frozen
    assert torch.equal(run(convert(model)), run(model))


@pytest.mark.parametrize("method", [LSQ(bits=4), DiffQConfig(target_bits=5, training_steps=4)], ids=lambda method: type(method).__name__)
def test_a_ready_made_adapter_that_does_not_fit_the_learned_ranges_is_said(method):
    """The base has trained itself, so nothing remembers what it was when its ranges were learned."""
    model = prepare(llama(), IDS, method)
    train(model, steps=8)
    convert(model)  # a warning would be an error
    merged = with_lora(model)
    for name, parameter in merged.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    merged = merged.merge_and_unload()
    with pytest.warns(
        DiffQWarning, match=r"ranges do not fit \d of the weights.*self_attn\.[qv]_proj\.weight' by \d+% of its norm, and by \d%"
    ) as told:
        convert(merged)
    assert told[0].filename == __file__


def test_a_model_that_is_frozen_as_a_whole_is_prepared():
    model = prepare_diffq(llama().requires_grad_(False), IDS, DiffQConfig(target_bits=5))
    assert {parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith(".weight")} == {False}
    assert all(quantizer.logits.requires_grad for quantizer in model.compression.learned)
