"""save_pretrained and from_pretrained of transformers: exact bits, or an error that says what to do; never random weights."""

import copy
import json
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import safetensors.torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto

from diffq_fx import DiffQConfig, DiffQError, PackedFileError, bits_report, convert, prepare, prepare_diffq
from diffq_fx.export import save_packed
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization
from diffq_fx.storage import StoredWeight

BODY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 67, "max_position_embeddings": 32}
EXPERTS = {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
IDS = {"input_ids": torch.randint(67, (2, 7), generator=torch.Generator().manual_seed(0))}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(architecture, config, **settings):
    return getattr(transformers, architecture)(getattr(transformers, config)(**settings, use_cache=False))


def qwen2(**settings):
    return make("Qwen2ForCausalLM", "Qwen2Config", **BODY, **TEXT, num_key_value_heads=1, tie_word_embeddings=True, **settings)


def run(model, inputs=IDS):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def stored(model):
    return [module for module in model.modules() if isinstance(module, StoredWeight)]


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    return convert(prepare(qwen2(), IDS, {"*k_proj*": STE(bits=3), "*": LSQ(bits=5)}))


@pytest.fixture
def folder(converted, tmp_path):
    converted.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


ARCHITECTURES = {
    "bert": (("BertForSequenceClassification", "BertConfig", {**BODY, **TEXT}), IDS),
    "gpt2": (("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 67, "n_positions": 32}), IDS),
    "llama": (("LlamaForCausalLM", "LlamaConfig", {**BODY, **TEXT, "num_key_value_heads": 1}), IDS),
    "vit": (("ViTForImageClassification", "ViTConfig", {**BODY, "image_size": 16, "patch_size": 8}), IMAGES),
    "experts": (
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**BODY, **TEXT, **EXPERTS}),
        IDS,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_model_comes_back_bit_for_bit(name, tmp_path):
    (architecture, config, settings), inputs = ARCHITECTURES[name]
    prepared = prepare_diffq(make(architecture, config, **settings), inputs, DiffQConfig(target_bits=5))
    with pytest.warns(match="never moved"):
        model = convert(prepared)
    model.save_pretrained(tmp_path)
    loaded, found = type(model).__mro__[2].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert bits_report(loaded).as_dict() == bits_report(model).as_dict()


@pytest.mark.parametrize("method", [LC(entries=4), ProductQuantization(entries=8)], ids=["LC", "product quantization"])
def test_codebooks(method, tmp_path):
    model = convert(prepare(qwen2(), IDS, method))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(model))
    assert loaded.compression == model.compression


def test_the_folder_is_small_and_has_tied_weights_once(converted, folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    big = tensors["model.embed_tokens.weight"]
    assert big.dtype == torch.uint8
    assert len(big) < 67 * 16 * 5 / 8 + 67 * 4 + 1000, "5 bits a weight, a scale a row, and what says so"


def test_shards_types_devices_and_a_second_round(converted, folder, tmp_path):
    converted.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), run(converted))
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for mine, theirs in zip(stored(half), stored(copy.deepcopy(converted).to(torch.bfloat16)), strict=True):
        assert mine().dtype == torch.bfloat16
        assert torch.equal(mine(), theirs())
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(run(twin), run(converted))


def test_device_map(converted, folder):
    pytest.importorskip("accelerate")
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")), run(converted))


def test_a_model_in_half_precision_comes_back_in_it(tmp_path):
    model = convert(prepare(qwen2().to(torch.bfloat16), IDS, STE(bits=4)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert run(loaded).dtype == torch.bfloat16
    assert torch.equal(run(loaded), run(model))


def test_a_body_without_its_head_and_a_head_around_a_body(converted, folder, tmp_path):
    assert torch.equal(run(AutoModel.from_pretrained(folder)), run(converted.model))
    converted.model.save_pretrained(tmp_path / "body")
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path / "body")), run(converted.model))
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "body")), run(converted))
    assert bits_report(AutoModel.from_pretrained(tmp_path / "body")).weights


class Toy(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)
        self.post_init()

    def forward(self, x):
        return (self.second(torch.relu(self.first(x))),)


def test_a_model_that_was_traced_whole(tmp_path):
    x = {"x": torch.randn(3, 16)}
    prepared = prepare(Toy(PreTrainedConfig()), x, STE(bits=4))
    model = convert(prepared)
    assert model.uses_graph
    model.save_pretrained(tmp_path)
    assert torch.equal(run(Toy.from_pretrained(tmp_path), x), run(model, x))


def test_a_folder_of_a_prepared_model_says_what_to_call(tmp_path):
    prepared = prepare(qwen2(), IDS, LSQ(bits=4))
    prepared.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not finished.*diffq_fx.convert\(model\).save_pretrained\(folder\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    prepared.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=False)


def test_without_diffq_fx_it_is_an_error_that_names_the_package(folder, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "diffq_fx")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "diffq_fx")
    with pytest.raises(ValueError, match="Install diffq-fx and transformers 5.23 or newer, and import diffq_fx.integrations.transformers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_of_ones_own_gives_no_random_weights(folder):
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder, config=qwen2().config)


def edit_tensors(folder, edit):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


PACKED = "model.layers.0.self_attn.q_proj.weight"


def flip(tensors):
    tensors[PACKED][len(tensors[PACKED]) // 2] ^= 1


BROKEN = {
    "no packed weight": (edit_tensors, lambda t: t.pop(PACKED), f"{PACKED}' is not whole"),
    "a part of a packed weight": (edit_tensors, lambda t: t.update({PACKED: t[PACKED][:-3].clone()}), f"{PACKED}' is not whole"),
    "no plain tensor": (edit_tensors, lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is not whole"),
    "a damaged weight": (edit_tensors, flip, f"weight '{PACKED}': .*checksum"),
    "another version": (edit_config, lambda q: q.update(version=2), "version 2 of diffq_fx; this diffq_fx reads version 1"),
    "an unknown method": (edit_config, lambda q: q["records"][""]["method"][0].__setitem__(1, "MyMethod"), "MyMethod, which is no method"),
    "no records": (edit_config, lambda q: q.update(records=[]), "config.json' is damaged: .*records"),
    "a record without its parts": (edit_config, lambda q: q["records"].update({"": {}}), "config.json' is damaged: KeyError"),
    "records of another kind": (edit_config, lambda q: q["records"][""].update(skipped=[]), "config.json' is damaged: AttributeError"),
    "a method's unknown setting": (
        edit_config,
        lambda q: q["records"][""]["method"][0][2].update(more=1),
        "config.json' is damaged: .*'more'",
    ),
    "a method's wrong setting": (
        edit_config,
        lambda q: q["records"][""]["method"][0][2].update(bits=99),
        "config.json' is damaged: .*got 99",
    ),
    "an unknown type": (edit_config, lambda q: q.update(dtype="zeros"), "float64, got 'zeros'"),
    "an unknown word": (edit_config, lambda q: q.update(more=1), "config.json' is damaged: TypeError.*'more'"),
    "a list of weights": (edit_config, lambda q: q.update(weights=[1, 2]), "config.json' is damaged: TypeError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_an_error(what, folder):
    edit, change, message = BROKEN[what]
    edit(folder, change)
    with pytest.raises(DiffQError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_float_folders_are_not_compressed_on_the_way(tmp_path):
    qwen2().save_pretrained(tmp_path)
    with pytest.raises(PackedFileError, match="no weights that diffq_fx compressed"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": "diffq_fx"})


def test_what_cannot_be_packed_is_an_error(converted, tmp_path):
    class Foreign(StoredWeight):
        def forward(self):
            return torch.zeros(16, 16)

        def footprint(self):
            raise NotImplementedError

    model = copy.deepcopy(converted)
    model.model.layers[0].self_attn.q_proj.weight_quantized = Foreign(stored(converted)[0].spec, torch.device("cpu"))
    with pytest.raises(PackedFileError, match="cannot hold a Foreign. Save the model that convert returned"):
        model.save_pretrained(tmp_path / "foreign")


def test_what_else_the_loaded_model_is_for(converted, folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    files = [save_packed(model, tmp_path / name).read_bytes() for name, model in (("a", loaded), ("b", converted))]
    assert files[0] == files[1]
    assert torch.equal(
        loaded.generate(**IDS, max_new_tokens=3, do_sample=False), converted.generate(**IDS, max_new_tokens=3, do_sample=False)
    )
    assert [each.spec.names for each in stored(loaded)] == [each.spec.names for each in stored(converted)]


@pytest.mark.parametrize("architecture", ["Olmo", "NanoChat"])
def test_a_decoder_whose_norms_have_no_weights_generates(architecture, tmp_path):
    """Every parameter of it is quantized, and transformers asks the first one for the type and the device."""
    settings = {**BODY, **TEXT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = convert(prepare(make(f"{architecture}ForCausalLM", f"{architecture}Config", **settings), IDS, STE(bits=4)))
    assert not sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (model.dtype, model.base_model.dtype, loaded.dtype, loaded.device.type) == (torch.float32,) * 2 + (torch.bfloat16, "cpu")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = [each.generate(**IDS, do_sample=False, max_new_tokens=3, use_cache=True) for each in (model, exact, model.to("cpu"))]
    assert texts[0].shape[1] > IDS["input_ids"].shape[1]
    assert all(torch.equal(texts[0], text) for text in texts)
