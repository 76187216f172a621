"""GGUF files of whole decoders: every value is the model's, transformers and llama.cpp compute with them what the model computes."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf
import transformers
from gguf_models import (
    BODY,
    EXACT,
    IDS,
    METASPACES,
    MODELS,
    PRE_TOKENIZERS,
    READ_BACK,
    TEXT,
    WORDS,
    decoder,
    llama_cpp,
    rounded,
    tokenizer_of,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._gguf import greedy, in_float32, values_of
from diffq_fx import DiffQConfig, ExportError, convert, prepare
from diffq_fx.export.gguf import export_gguf, refuse_unknown
from diffq_fx.methods import LC, STE, ProductQuantization
from diffq_fx.parts import stored_weights

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> the converted model, its file and what the export says; each made once."""
    found, words = {}, tmp_path_factory.mktemp("tokenizer")
    tokenizer_of("gpt-2", words)

    def make(name):
        if name not in found:
            model, path = rounded(decoder(name)), tmp_path_factory.mktemp(name) / "model.gguf"
            found[name] = model, path, export_gguf(model, path, tokenizer=words)
        return found[name]

    return make


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def expected_values(model):
    """Name in the state_dict -> value, of weights and all else."""
    stored = {name: weight().float() for _, weight in stored_weights(model) for name in weight.spec.names}
    return {**{name: value for name, value in model.state_dict().items() if "_quantized." not in name}, **stored}


def in_order_of_transformers(name, values, config):
    """llama.cpp pairs neighbouring channels where transformers pairs halves of a head."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}[name.split(".")[2]]
    per_head = values.unflatten(0, (heads, -1))
    return torch.cat([per_head[:, 0::2], per_head[:, 1::2]], 1).flatten(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_the_models(name, made):
    model, path, result = made(name)
    expected, found = expected_values(model), values_of(path)
    assert {tensor.name for tensor in result.tensors} == {*found}
    for tensor in result.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        values = found[tensor.name]
        if MODELS[name][0] in ("Llama", "Mistral") and tensor.name.split(".")[-2] in ("attn_q", "attn_k"):
            values = in_order_of_transformers(tensor.name, values, model.config)
        wanted = expected.pop(tensor.weight)
        assert torch.equal(values, wanted.t() if ".c_" in tensor.weight and wanted.dim() > 1 else wanted)  # a Conv1D has (inputs, outputs)
        assert tensor.type == ("Q4_0" if tensor.learned_bits else "F32")
    assert [*expected] == (["lm_head.weight"] if model.config.tie_word_embeddings else []), "nothing else is left out"
    assert result.bits_per_weight == 4.5
    assert result.file_bytes == path.stat().st_size


@pytest.mark.parametrize("name", READ_BACK)
def test_transformers_computes_the_same_from_the_file(name, made):
    model, path, _ = made(name)
    back = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**IDS).logits, model(**IDS).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_generates_the_same(name, made):
    """In float32 each token is the model's; with blocks llama.cpp rounds activations to 8 bits, and most are."""
    model, path, _ = made(name)
    prompts = torch.randint(WORDS, (3, 8), generator=torch.Generator().manual_seed(1)).tolist()
    expected = greedy(model, prompts, 12)
    assert llama_cpp(in_float32(path), prompts, 12)["generated"] == expected
    followed = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, expected, strict=True)]
    found = llama_cpp(path, followed=followed)["next"]
    same = [a == b for tokens, wanted in zip(found, expected, strict=True) for a, b in zip(tokens[-12:], wanted, strict=True)]
    assert sum(same) > len(same) / 2


TEXTS = ["Hello world 1234567, it's 5+x\n\n  two", "Größe 10 %", "a", *map(str.strip, TEXT.splitlines())]


@pytest.mark.parametrize("kind", [*PRE_TOKENIZERS, *METASPACES])
def test_texts_are_cut_as_by_the_tokenizer(kind, made, tmp_path):
    model, *_ = made("llama")
    path, tokenizer = tmp_path / "model.gguf", tokenizer_of(kind, tmp_path)
    export_gguf(model, path, tokenizer=tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == ("default" if kind in METASPACES else kind)
    assert len(fields["tokenizer.ggml.tokens"].data) == model.config.vocab_size
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    if kind not in ("smollm", "no-space"):  # transformers reads neither of a file
        back = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        assert [back(text, add_special_tokens=False).input_ids for text in TEXTS] == expected
    assert llama_cpp(path, texts=TEXTS)["tokens"] == expected


def test_widths_that_differ_each_take_their_type(path):
    method = {"*down_proj*": replace(EXACT, bits=8), "*": replace(EXACT, exclude=("*v_proj*",))}
    result = export_gguf(rounded(decoder("qwen2"), method), path, tokenizer=None)
    types = {
        tensor.weight.split(".")[-2]: (tensor.type, tensor.learned_bits) for tensor in result.tensors if tensor.weight.endswith("weight")
    }
    assert (types["down_proj"], types["up_proj"], types["v_proj"]) == (("Q8_0", 8), ("Q4_0", 4), ("F32", None))
    assert 4.5 < result.bits_per_weight < 8.5
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0


def test_a_model_in_half_precision_keeps_its_other_matrices_in_it(path):
    model = rounded(decoder("llama", dtype=torch.bfloat16).bfloat16(), replace(EXACT, exclude=("*embed_tokens*",)))
    result = export_gguf(model, path, tokenizer=None)
    assert {tensor.type for tensor in result.tensors} == {"Q4_0", "BF16", "F32"}
    assert torch.equal(values_of(path)["token_embd.weight"], model.model.embed_tokens.weight.float())


def test_a_file_in_the_way_is_replaced_whole(made, path):
    path.write_bytes(b"old")
    model, _, first = made("llama")
    state = torch.get_rng_state()
    assert export_gguf(nn.DataParallel(model), str(path), tokenizer=None, name="mine").file_bytes > 1000
    assert torch.equal(torch.get_rng_state(), state)
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "mine"
    assert os.listdir(path.parent) == [path.name]
    assert {tensor.name for tensor in first.tensors} == {*values_of(path)}


REFUSED = {
    "prepared": (lambda: prepare(decoder("llama"), IDS, EXACT), "the LlamaForCausalLM is prepared, not converted. Call convert_diffq"),
    "float": (lambda: decoder("llama"), "LlamaForCausalLM was never converted. Prepare, train and convert it first"),
    "no config": (lambda: convert(prepare(nn.Linear(32, 32), torch.zeros(1, 32), EXACT)), "none of transformers: it has no config"),
    "architecture": (
        lambda: rounded(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**BODY, "vocab_size": WORDS}))),
        "architecture 'gpt_neox' is not known, only 'gpt2', 'llama', 'mistral', 'qwen2', 'qwen3' are",
    ),
    "no head": (lambda: rounded(decoder("qwen2").model), "the Qwen2Model has no head that gives the next token"),
    "classifier": (lambda: rounded(decoder("llama").model), "has no head"),
    "activation": (
        lambda: rounded(decoder("llama", hidden_act="gelu")),
        "hidden_act='gelu', and a runtime of GGUF computes llama with 'silu'",
    ),
    "rope": (
        lambda: rounded(decoder("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
        "rope_parameters={.*'dynamic'.*; GGUF can say those of rope_type 'default', 'linear', 'llama3' alone",
    ),
    "partial": (
        lambda: rounded(decoder("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})),
        "rope_parameters={.*0.5",
    ),
    "scales": (
        lambda: rounded(decoder("llama"), STE(bits=4, group_size=32, grid="symmetric")),
        r"weight 'model.embed_tokens.weight': \d+ of its 832 scales are no float16 values.*scale_dtype",
    ),
    "widths": (lambda: rounded(decoder("llama"), STE(bits=9, group_size=32, grid="symmetric", scale_dtype="float16")), "Q8_0, the widest"),
    "a bias of no tensor": (
        lambda: rounded(decoder("qwen3", attention_bias=True)),
        r"tensor 'model.layers.0.self_attn.\w_proj.bias' has no place in the file: the architecture 'qwen3' of llama.cpp",
    ),
    "codebooks": (
        lambda: rounded(decoder("llama"), ProductQuantization(entries=4, block_size=4)),
        "'model.embed_tokens.weight' is a CodebookWeight, and GGUF holds integers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_a_file_cannot_hold_leaves_none(case, path):
    make, says = REFUSED[case]
    model = make()
    with pytest.raises(ExportError, match=f"^export_gguf: .*{says}"):
        export_gguf(model, path, tokenizer=None)
    assert not os.listdir(path.parent)


def _of_fewer_layers(model):
    model.model.layers = model.model.layers[:1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_of_fewer_layers, r"the config says that there is a tensor 'model\.layers\.1\..*', and the model has none"),
        (lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0), "computes something else: its logits differ by"),
        (lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 0.5), "computes something else"),
        (lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()), "computes something else"),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(0.1), "computes something else"),
    ],
    ids=["layers", "scaling", "epsilon", "activation", "frequencies"],
)
def test_a_model_that_its_config_does_not_tell_of_leaves_no_file(change, said, path):
    model = decoder("llama")
    change(model)
    with pytest.raises(ExportError, match=said):
        export_gguf(rounded(model), path, tokenizer=None)
    assert not path.exists()


def test_a_number_of_tokens_that_the_config_has_otherwise(path):
    (model := rounded(decoder("llama"))).config.vocab_size += 1
    with pytest.raises(ExportError, match=r"^export_gguf: the config has vocab_size=\d+ and the model's embedding \d+ tokens\. Set config"):
        export_gguf(model, path, tokenizer=None)


def test_a_tensor_without_a_place_is_met_before_the_compression():
    with pytest.raises(ExportError, match="^export_gguf: .*has no place in the file"):
        refuse_unknown(decoder("qwen3", attention_bias=True), None)
    for name in MODELS:
        refuse_unknown(decoder(name), None)


def test_a_tensor_of_another_library_has_no_place(made, path):
    model = rounded(decoder("llama"))
    model.model.layers[0].adapter = nn.Linear(4, 4)
    with pytest.raises(ExportError, match=r"tensor 'model.layers.0.adapter.weight' has no place in the file"):
        export_gguf(model, path, tokenizer=None)
    with torch.no_grad():
        model.model.layers[0].adapter = None
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ExportError, match=r"tensor 'model.norm.weight' is not finite in 1 of 64 places, first at \(3,\)"):
        export_gguf(model, path, tokenizer=None)


def change(folder, **changes):
    described = json.loads((folder / "tokenizer.json").read_text())
    for key, value in changes.items():
        described[key] = value(described[key])
    (folder / "tokenizer.json").write_text(json.dumps(described))


NO_TOKENIZER = {
    "missing": (
        lambda folder: shutil.rmtree(folder),
        r"has no tokenizer.json. Give the folder that tokenizer.save_pretrained wrote. export_gguf",
    ),
    "damaged": (lambda folder: (folder / "tokenizer.json").write_text("{"), "is no tokenizer that can be read: JSONDecodeError"),
    "empty": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer that can be read: KeyError: 'model'"),
    "unigram": (lambda folder: change(folder, model=lambda model: {**model, "type": "Unigram"}), "is a Unigram, and .* BPE alone"),
    "words": (lambda folder: change(folder, pre_tokenizer=lambda _: {"type": "Whitespace"}), "cuts words in a way that has no name here"),
    "lowercase": (
        lambda folder: change(folder, normalizer=lambda _: {"type": "Lowercase"}),
        "changes texts by .*Lowercase.*, which runtimes do not",
    ),
    "whole words": (
        lambda folder: change(folder, model=lambda model: {**model, "ignore_merges": True}),
        "ignores merges for words that are tokens, which runtimes do for Llama 3's alone",
    ),
    "no merges": (
        lambda folder: change(folder, model=lambda model: {**model, "merges": []}),
        "has no merges, and runtimes read no BPE without any",
    ),
    "suffix": (
        lambda folder: change(folder, model=lambda model: {**model, "end_of_word_suffix": "</w>"}),
        "changes texts by .*end_of_word_suffix.*, which runtimes do not",
    ),
    "another": (
        lambda folder: change(folder, added_tokens=lambda old: [*old, {**old[0], "id": 500, "content": "<x>"}]),
        "has 501 tokens and the model's embedding 416: it is another model's tokenizer",
    ),
}


@pytest.mark.parametrize("case", NO_TOKENIZER)
def test_a_tokenizer_that_a_file_cannot_hold_leaves_the_old_file(case, made, tmp_path):
    spoil, says = NO_TOKENIZER[case]
    folder, path = tmp_path / "tokenizer", tmp_path / "model.gguf"
    path.write_bytes(b"old")
    tokenizer_of("gpt-2", folder)
    spoil(folder)
    with pytest.raises(ExportError, match=f"^export_gguf: .*{says}"):
        export_gguf(made("llama")[0], path, tokenizer=folder)
    assert path.read_bytes() == b"old"
    assert {*os.listdir(tmp_path)} <= {"model.gguf", "tokenizer"}


def test_a_codebook_of_powers_of_two_is_a_grid(path):
    model = convert(prepare(decoder("llama"), IDS, LC(codebook="powers_of_two", smallest_power=2)))
    result, values, expected = export_gguf(model, path, tokenizer=None), values_of(path), expected_values(model)
    held = [each for each in result.tensors if each.learned_bits is not None]
    assert {each.type for each in held} == {"Q4_0"}, "-4 to 4 quarters"
    for each in held:
        if each.name.split(".")[-2] not in ("attn_q", "attn_k"):  # whose rows lie in another order
            assert torch.equal(values[each.name], expected[each.weight])


def test_paths_that_cannot_be_written(made, tmp_path):
    model = made("llama")[0]
    tokenizer_of("gpt-2", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for target, says in (
        (tmp_path / "tokenizer.json", "is the same file as"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "model.gguf", "make its folder first"),
    ):
        with pytest.raises(ExportError, match=rf"^export_gguf: .*{says}.*(?<!\.)\.$"):
            export_gguf(model, target, tokenizer=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupt_leaves_the_old_file(made, path, monkeypatch):
    path.write_bytes(b"old")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(made("llama")[0], path, tokenizer=None)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_trained_by_the_default_method_with_block_scales(path):
    """Learned widths: one a weight, of those that blocks have."""
    config = DiffQConfig(
        target_bits=5.0, group_size="tensor", range_per=32, grid="symmetric", widths=(4, 5, 8), scale_dtype="float16", training_steps=8
    )
    prepared = prepare(decoder("llama"), IDS, config)
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=1e-3)
    for _ in range(8):
        prepared(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = convert(prepared)
    result = export_gguf(model, path, tokenizer=None)
    expected, found = expected_values(model), values_of(path)
    assert torch.equal(found["token_embd.weight"], expected["model.embed_tokens.weight"])
    assert {tensor.type for tensor in result.tensors} <= {"Q4_0", "Q5_0", "Q8_0", "F32"}
    assert result.bits_per_weight <= 5.0
