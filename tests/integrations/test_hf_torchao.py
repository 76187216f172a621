"""Plain models of transformers with torchao's tensors of our bits: save_pretrained and from_pretrained keep every one of them."""

import json

import pytest
import torch

pytest.importorskip("torchao")
pytest.importorskip("transformers")

import transformers
from torchao.quantization import IntxUnpackedToInt8Tensor, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from diffq_fx import DiffQWarning, PackedFileError
from diffq_fx.integrations.torchao import QATConfig, whole_model
from diffq_fx.methods import STE

BODY = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"input_ids": torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(0))}
MIXED = {"*embed*": STE(bits=8), "*down_proj*": STE(bits=3, group_size=32), "*k_proj*": STE(bits=6, grid="symmetric"), "*": STE(bits=4)}


def trained(methods, dtype=torch.float32, **settings):
    """A decoder after the two steps of torchao's quantize_ with a step of training between them."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**BODY, **settings), dtype=dtype)
    quantize_(model, QATConfig(methods, IDS, step="prepare"), whole_model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    optimizer.step()
    quantize_(model.eval(), QATConfig(step="convert"), whole_model)
    return model


def tensors(model):
    named = model.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in named if isinstance(weight, IntxUnpackedToInt8Tensor)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_comes_back_bit_for_bit(tied, dtype, tmp_path):
    model = trained(MIXED, dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    mine, theirs = tensors(model), tensors(loaded)
    assert mine.keys() == theirs.keys()
    assert {weight.target_dtype for weight in mine.values()} == {torch.int3, torch.int4, torch.int6, torch.int8}
    for name, weight in mine.items():
        assert (weight.target_dtype, weight.block_size) == (theirs[name].target_dtype, tuple(theirs[name].block_size))
        for part in ("qdata", "scale", "zero_point"):
            assert torch.equal(getattr(weight, part), getattr(theirs[name], part)), (name, part)
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, model(**IDS).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_the_config_says_what_each_weight_is_and_is_torchaos(tmp_path):
    trained(MIXED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "fusion_config" not in config, "nobody needs diffq_fx for this folder"
    assert config["quantization_config"]["quant_method"] == "torchao"
    described = TorchAoConfig.from_dict(config["quantization_config"]).quant_type.fqn_to_config
    assert described["model.layers.1.mlp.down_proj"].weight_dtype == torch.int3
    assert described["model.layers.1.mlp.down_proj"].granularity.group_size == 32
    assert described["model.layers.0.self_attn.k_proj"].mapping_type.name == "SYMMETRIC"
    assert len(described) == 16


def test_weights_for_which_torchao_has_no_form_are_named_by_save_pretrained(tmp_path):
    with pytest.warns(DiffQWarning, match=r"embed_tokens\.weight: 12 bits"):
        model = trained({"*embed*": STE(bits=12), "*": STE(bits=4)})
    with pytest.raises(PackedFileError, match="save_pretrained: "):
        model.save_pretrained(tmp_path / "folder")


def test_what_torchao_has_no_form_for_is_named_before_the_training():
    """GPT-2's projections are no linear layers of torch, and its tied embedding has too many bits here."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=1, n_head=2))
    with pytest.warns(DiffQWarning, match="will stay as diffq_fx stores them") as told:
        quantize_(model, QATConfig({"*wte*": STE(bits=12), "*": STE(bits=4)}, IDS, step="prepare"), whole_model)
    said = str(told[0].message)
    assert "transformer.wte.weight: 12 bits" in said
    assert "attn.c_attn.weight: read by addmm" in said
    assert "wpe" not in said
    assert "save_pretrained writes no model that has both" in said
