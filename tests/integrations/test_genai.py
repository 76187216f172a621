"""Folders for onnxruntime-genai: every level, scale and zero point of the model, and its tokens; or one sentence and no folder."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

import numpy as np
import safetensors.torch
import transformers
from tokenizers import Tokenizer, models

from diffq_fx import DiffQConfig, DiffQWarning, ExportError, convert, prepare, prepare_diffq
from diffq_fx.integrations import genai
from diffq_fx.integrations.genai import export_genai
from diffq_fx.integrations.olive import save_olive
from diffq_fx.methods import LC, STE, ProductQuantization
from diffq_fx.storage import StoredWeight

BODY = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 94, "eos_token_id": 95, "pad_token_id": 95, "max_position_embeddings": 128, "num_key_value_heads": 2}
IDS = {"input_ids": torch.randint(90, (2, 8), generator=torch.Generator().manual_seed(0))}
HELD = STE(bits=4)


@pytest.fixture(scope="session")
def tokenizer():
    letters = {chr(33 + index): index for index in range(94)} | {"<s>": 94, "</s>": 95}
    made = Tokenizer(models.BPE(letters, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def decoder(architecture="Llama", **settings):
    """With weights large enough for one token to be far ahead of the next."""
    config = getattr(transformers, f"{architecture}Config")(**BODY, **SPECIAL, initializer_range=0.3, **settings)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


def unpacked(tensors, module, bits):
    """The float weight that a folder stands for, by the format's own rules."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)

    def levels(packed):
        return ((packed[:, :, None] >> shifts) & (2**bits - 1)).flatten(1).int()

    scale, quantized = tensors[f"{module}.scales"], levels(tensors[f"{module}.qweight"])
    group = quantized.shape[1] // scale.shape[1]
    zero_point = levels(tensors[f"{module}.qzeros"])[:, : scale.shape[1]]
    return (quantized - zero_point.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def written(model, folder, tokenizer):
    result = save_olive(model, folder, tokenizer)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "olive"
    for module, (_, bits, group) in result.held.items():
        settings = {name: config[name] for name in ("bits", "group_size")} | config["overrides"].get(module, {})
        assert settings == {"bits": bits, "group_size": group}
    return result, safetensors.torch.load_file(folder / "model.safetensors")


def expected(model):
    """Module -> the float weight of a converted model."""
    named = {name: module() for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, StoredWeight)}
    return {name.removesuffix(".weight_quantized"): weight for name, weight in named.items()}


METHODS = {
    "4 bits": (STE(bits=4), 4, 32),
    "3 bits in blocks": (STE(bits=3, group_size=32), 4, 32),
    "blocks of 48, of which 16 are a block too": (STE(bits=4, group_size=48), 4, 16),
    "2 bits, half zero points": (STE(bits=2, grid="half"), 4, 32),
    "2 bits": (STE(bits=2), 2, 32),
    "float16 scales": (STE(bits=4, group_size=32, scale_dtype="float16"), 4, 32),
    "6 bits, symmetric": (STE(bits=6, grid="symmetric"), 8, 32),
    "one scale": (STE(bits=8, group_size="tensor"), 8, 32),
    "ternary": (LC(codebook="scaled_ternary"), 2, 32),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:save_olive. the levels take:diffq_fx.DiffQWarning")
def test_every_value_is_the_models(name, tokenizer, tmp_path):
    method, bits, group = METHODS[name]
    model = convert(prepare(decoder(tie_word_embeddings=False), IDS, {"*down_proj*": method, "*": HELD}))
    result, tensors = written(model, tmp_path / "folder", tokenizer)
    assert result.held["model.layers.0.mlp.down_proj"][1:] == (bits, group)
    weights = expected(model)
    for module, (_, container, _) in result.held.items():
        assert torch.equal(unpacked(tensors, module, container), weights.pop(module)), module
    assert list(weights) == ["model.embed_tokens"] == [name.removesuffix(".weight") for name in result.in_float]
    assert torch.equal(tensors["model.embed_tokens.weight"], weights["model.embed_tokens"])
    assert not result.builder_options


def test_learned_bits_lie_in_the_widest_container_and_the_size_is_said(tokenizer, tmp_path):
    with pytest.warns(DiffQWarning, match="never moved"):
        model = convert(prepare_diffq(decoder(tie_word_embeddings=True), IDS, DiffQConfig(target_bits=5)))
    with pytest.warns(DiffQWarning, match=r"the levels take 0\.\d\d MiB in containers of 2, 4 or 8 bits, 0\.\d\d MiB as learned"):
        result, tensors = written(model, tmp_path / "folder", tokenizer)
    weights = expected(model)
    assert set(result.held) == set(weights) - {"model.embed_tokens"}
    assert torch.equal(unpacked(tensors, "lm_head", result.held["lm_head"][1]), weights["lm_head"])
    assert torch.equal(tensors["model.embed_tokens.weight"], weights["lm_head"]), "a tied weight is both"
    assert result.builder_options == {"shared_embeddings": "false"}


def test_what_is_learned_for_this_runtime_takes_no_more_than_it_must(tokenizer, tmp_path):
    with pytest.warns(DiffQWarning, match="never moved"):
        model = convert(prepare_diffq(decoder(), IDS, DiffQConfig.for_runtime("onnxruntime-genai", target_bits=5.5)))
    result, tensors = written(model, tmp_path / "folder", tokenizer)  # a warning would be an error
    weights = expected(model)
    for module, (bits, container, group) in result.held.items():
        assert (bits, group) == (container, 32)
        assert torch.equal(unpacked(tensors, module, container), weights[module])


def test_a_fused_projection_is_written_as_its_parts(tokenizer, tmp_path):
    model = convert(prepare(decoder("Phi3", original_max_position_embeddings=128), IDS, HELD))
    tokenizer.save_pretrained(tmp_path / "source")
    _, tensors = written(model, tmp_path / "folder", tmp_path / "source")
    for fused, parts in {"self_attn.qkv": ("q", "k", "v"), "mlp.gate_up": ("gate", "up")}.items():
        path = f"model.layers.1.{fused.partition('.')[0]}"
        joined = torch.cat([unpacked(tensors, f"{path}.{part}_proj", 4) for part in parts])
        assert torch.equal(joined, expected(model)[f"model.layers.1.{fused}_proj"])
    assert [len(tensors[f"model.layers.0.self_attn.{part}_proj.scales"]) for part in "qkv"] == [64, 32, 32]


def test_a_head_in_float_is_not_to_be_rounded_by_the_builder(tokenizer, tmp_path):
    model = convert(prepare(decoder(tie_word_embeddings=True), IDS, {"*layers*": HELD}))
    result, tensors = written(model, tmp_path / "folder", tokenizer)
    assert torch.equal(tensors["model.embed_tokens.weight"], model.lm_head.weight)
    assert result.builder_options == {"nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather"}


def gpt2(**_):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32))


REFUSED = {
    "no decoder": (lambda: decoder().model, HELD, "a LlamaModel is no decoder of transformers that generates with a cache"),
    "other names": (gpt2, HELD, "does not know 'transformer.*' of a GPT2LMHeadModel in quantized folders"),
    "too wide": (
        decoder,
        {"*up_proj*": STE(bits=12), "*": HELD},
        "up_proj.weight': the widest channel has 12; the format has up to 8 bits",
    ),
    "small blocks": (decoder, {"*up_proj*": STE(bits=4, group_size=8), "*": HELD}, "has 64 inputs and a scale for 8 of them"),
    "odd sizes": (lambda: decoder(head_dim=14), HELD, "o_proj.weight' has 56 inputs and a scale for 56 of them"),
    "float grid": (decoder, {"*up_proj*": STE(bits=4, grid="float"), "*": HELD}, "up_proj.weight' is on the float grid"),
    "a codebook": (decoder, {"*up_proj*": LC(entries=5), "*": HELD}, "has a codebook that is not integers times one scale"),
    "blocks of codes": (decoder, {"*up_proj*": ProductQuantization(entries=8), "*": HELD}, "has a codebook that is not integers"),
    "a float layer": (decoder, {"*mlp*": HELD}, r"self_attn\.q_proj\.weight' is a float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_in_a_sentence_and_leaves_no_folder(name, tokenizer, tmp_path):
    make, method, reason = REFUSED[name]
    model = convert(prepare(make(), IDS, method))
    with pytest.raises(ExportError, match=f"^save_olive: .*{reason}"):
        save_olive(model, tmp_path / "folder", tokenizer)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tokenizer, tmp_path):
    model, larger = convert(prepare(decoder(), IDS, HELD)), copy.deepcopy(tokenizer)
    larger.add_tokens(["one more"])
    with pytest.raises(ExportError, match=r"save_olive: the tokenizer has \d+ tokens and the model's embedding \d+: it is another model's"):
        save_olive(model, tmp_path / "folder", larger)
    assert not (tmp_path / "folder").exists()


def test_a_model_that_is_not_converted_a_tokenizer_that_is_none_and_a_folder_that_is_there(tokenizer, tmp_path):
    prepared = prepare(decoder(), IDS, HELD)
    for model in (prepared, decoder()):
        with pytest.raises(ExportError, match="save_olive: .*(prepared, not converted|was never converted)"):
            save_olive(model, tmp_path / "folder", tokenizer)
    model = convert(prepared)
    with pytest.raises(
        TypeError, match="save_olive: tokenizer must be the model's tokenizer of transformers, or a folder with one, got NoneType"
    ):
        save_olive(model, tmp_path / "folder", None)
    expected = "no tokenizer: expected tokenizer.json, which tokenizer.save_pretrained writes, or"
    folders = {
        "empty": (None, "", f"{expected} .*; found no file"),
        "settings": ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', f"{expected} .*; found tokenizer_config.json"),
        "a model": ("config.json", '{"model_type": "llama"}', f"{expected} .*; found config.json"),
        "damaged": ("tokenizer.json", "{", "no tokenizer that transformers can load. .* JSONDecodeError: .*"),
        "nowhere": (None, "", "no tokenizer: there is no such folder"),
    }
    for name, (file, text, said) in folders.items():
        words = tmp_path / "words" / name
        words.mkdir(parents=True) if name != "nowhere" else None
        (words / file).write_text(text) if file else None
        with pytest.raises(ExportError, match=f"^save_olive: '{words}' has {said}") as error:
            save_olive(model, tmp_path / "folder", words)
        assert "Put its files there, or give the tokenizer itself." in str(error.value)
        assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "words")
    (tmp_path / "mine").write_text("kept")
    for there in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ExportError, match="is there already"):
            save_olive(model, there, tokenizer)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


# The runtime


PROMPTS = torch.randint(90, (20, 5), generator=torch.Generator().manual_seed(1))
TOKENS = 20
EVERY_CONTAINER = {
    "*embed*": STE(bits=8),
    "*gate_proj*": STE(bits=2),
    "*down_proj*": STE(bits=3, group_size=32),
    "*v_proj*": STE(bits=7, grid="symmetric"),
    "*": HELD,
}


@pytest.fixture(scope="session")
def runtime():
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


@pytest.fixture(scope="session")
def llama(tokenizer):
    torch.manual_seed(0)
    return convert(prepare(decoder(tie_word_embeddings=True), IDS, EVERY_CONTAINER))


@pytest.fixture(scope="session")
def llama_folder(runtime, llama, tokenizer, tmp_path_factory):
    return export_genai(llama, tmp_path_factory.mktemp("genai") / "exact", tokenizer, exact=True)


def greedy(model):
    """What transformers generates after each prompt, up to the end."""
    after = {"do_sample": False, "max_new_tokens": TOKENS, "attention_mask": torch.ones_like(PROMPTS)}
    return [whole(row.tolist()) for row in model.generate(PROMPTS, **after)]


def whole(tokens):
    """Up to the token that ends a text, which transformers hands out and onnxruntime-genai does not."""
    return tokens[: tokens.index(95)] if 95 in tokens else tokens


def greedy_of(runtime, folder):
    model = runtime.Model(str(folder))
    texts = []
    for prompt in PROMPTS.tolist():
        settings = runtime.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
        generator = runtime.Generator(model, settings)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(whole(generator.get_sequence(0).tolist()))
    return texts


@pytest.mark.slow
def test_greedy_tokens_are_ours_with_every_container_and_an_embedding_that_is_the_head(runtime, llama, llama_folder):
    assert {bits for _, bits, _ in llama_folder.held.values()} == {2, 4, 8}
    assert not llama_folder.in_float
    texts = greedy(llama)
    assert len({*map(tuple, texts)}) == len(PROMPTS)
    assert greedy_of(runtime, llama_folder.path) == texts
    assert llama_folder.file_size < 60_000 + sum(path.stat().st_size for path in llama_folder.path.glob("*.data"))


@pytest.mark.slow
def test_another_architecture_with_biases_a_head_of_its_own_and_projections_that_the_builder_joins(runtime, tokenizer, tmp_path):
    model = convert(prepare(decoder("Qwen2", tie_word_embeddings=False), IDS, {"*lm_head*": STE(bits=8), "*": HELD}))
    result = export_genai(model, tmp_path / "folder", tokenizer, exact=True)
    assert result.in_float == ("model.embed_tokens.weight",)
    assert b"attn/qkv_proj/MatMulNBits" in (tmp_path / "folder" / "model.onnx").read_bytes()
    assert greedy_of(runtime, tmp_path / "folder") == greedy(model)


@pytest.mark.slow
def test_inputs_of_8_bits_are_the_default_and_nearly_always_give_the_same_next_token(runtime, llama, tokenizer, tmp_path):
    export_genai(llama, tmp_path / "fast", tokenizer)
    fast, ours = greedy_of(runtime, tmp_path / "fast"), greedy(llama)
    nexts = [each[:6] == own[:6] for each, own in zip(fast, ours, strict=True)]
    assert sum(nexts) >= 15
    assert fast != ours, "another mode than the exact one"


@pytest.mark.slow
def test_a_sliding_window_in_every_layer_is_one_in_the_runtime_too(runtime, tokenizer, tmp_path):
    model = convert(prepare(decoder("Mistral", sliding_window=4), IDS, HELD))
    export_genai(model, tmp_path / "folder", tokenizer, exact=True)
    assert greedy_of(runtime, tmp_path / "folder") == greedy(model)


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package onnxruntime-genai .*: pip install 'diffq-fx\[onnxruntime-genai\]'"):
        export_genai(llama, tmp_path / "folder", tokenizer)
    assert not any(tmp_path.iterdir())


COPIED = "import os, shutil; shutil.copytree(FOLDER, target, dirs_exist_ok=True)"
BROKEN_BUILDERS = {
    "fails": (
        "raise NotImplementedError(f'The {source} model is not currently supported.')",
        "failed. NotImplementedError: The LlamaForCausalLM model",
    ),
    "writes nothing": ("", "failed. It wrote no model.onnx, genai_config.json, tokenizer.json, tokenizer_config.json. Where it lacks"),
    **{
        f"leaves out {name}": (f"{COPIED}; os.remove(target + '/{name}')", f"failed. It wrote no {name}")
        for name in ("model.onnx", "genai_config.json", "tokenizer.json")
    },
    **{
        f"leaves {name} half": (
            f"{COPIED}; path = target + '/{name}'; os.truncate(path, os.path.getsize(path) // 2)",
            "is damaged. .*Error: ",
        )
        for name in ("model.onnx", "model.onnx.data", "genai_config.json")
    },
    "leaves out levels": (f"{COPIED}; os.remove(target + '/model.onnx.data')", "is damaged. FileNotFoundError: "),
    "computes otherwise": (
        "import onnx, shutil; shutil.copytree(FOLDER, target, dirs_exist_ok=True); made = target + '/model.onnx'; "
        "model = onnx.load(made, load_external_data=False); "
        "[setattr(each, 'f', 0.1) for node in model.graph.node for each in node.attribute if each.name == 'epsilon']; onnx.save(model, made)",
        r"computes something else than this LlamaForCausalLM: over 32 tokens its logits differ by 0\.\d+ of their norm, and 0.001 is allowed",
    ),
    "does not run": (
        "import shutil; shutil.copytree(FOLDER, target, dirs_exist_ok=True); settings = target + '/genai_config.json'; "
        "said = open(settings).read().replace('past_key_values.%d.key', 'past.%d'); open(settings, 'w').write(said)",
        "cannot run what its builder made of a LlamaForCausalLM: .*Use export_onnx",
    ),
    "rounds again": (
        "import shutil; shutil.copytree(FOLDER, target, dirs_exist_ok=True); data = target + '/model.onnx.data'; "
        "levels = bytearray(open(data, 'rb').read()); levels[AT] ^= 1; open(data, 'wb').write(levels)",
        "made other levels or scales of 'model.layers.0.self_attn.q_proj' than the model has",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_BUILDERS)
def test_a_builder_that_fails_or_changes_the_model_leaves_no_folder(name, runtime, llama, llama_folder, tokenizer, tmp_path, monkeypatch):
    script, sentence = BROKEN_BUILDERS[name]
    data = (llama_folder.path / "model.onnx.data").read_bytes()
    folder = save_olive(llama, tmp_path / "olive", tokenizer).path
    levels = safetensors.torch.load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.qweight"].numpy().tobytes()
    script = script.replace("FOLDER", repr(str(llama_folder.path))).replace("AT", str(data.index(levels)))
    (tmp_path / "builder.py").write_text(f"import sys; source, target = sys.argv[2], sys.argv[4]; {script}")
    monkeypatch.setattr(genai, "_builder", lambda: tmp_path / "builder.py")
    shutil.rmtree(folder)
    with pytest.raises(ExportError, match=f"^export_genai: .*{sentence}"):
        export_genai(llama, tmp_path / "folder", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["builder.py"]
    with pytest.raises(ExportError, match="^export_genai: a LlamaModel is no decoder"):
        export_genai(llama.model, tmp_path / "folder", tokenizer)


NUMBERS = {
    "vocab_size above": (
        lambda model: setattr(model.config, "vocab_size", 128),
        "the config has vocab_size=128 and the model's embedding 96",
    ),
    "vocab_size below": (
        lambda model: setattr(model.config, "vocab_size", 80),
        "the config has vocab_size=80 and the model's embedding 96",
    ),
    "head": (lambda model: setattr(model.lm_head, "out_features", 95), "the config has vocab_size=96 and the model's head 95 tokens"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_tokens_that_differ_are_said_before_anything_is_written(name, tokenizer, tmp_path):
    change, says = NUMBERS[name]
    change(model := decoder())
    with pytest.raises(ExportError, match=f"^save_olive: {says}"):
        save_olive(model, tmp_path / "folder", tokenizer)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_tokenizer_that_the_runtime_cannot_read_is_said(runtime, llama, tmp_path):
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(96)}, unk_token="t0"))
    with pytest.warns(
        DiffQWarning, match=r"export_genai: onnxruntime-genai.* cannot read this tokenizer \(.*it gets tokens from the folder"
    ):
        export_genai(llama, tmp_path / "folder", transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_with_an_embedding_of_its_own(dtype, runtime, tokenizer, tmp_path):
    """The embedding is a float in the folder: the product of level and scale, which half precision would round."""
    made = transformers.AutoModelForCausalLM.from_config(decoder(tie_word_embeddings=False).config, dtype=dtype)
    model = convert(prepare(made, IDS, {"*embed*": STE(bits=8), "*": HELD}))
    export_genai(model, tmp_path / "folder", tokenizer, exact=True)
    assert greedy_of(runtime, tmp_path / "folder") == greedy(copy.deepcopy(model).float())
