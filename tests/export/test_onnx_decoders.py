"""Decoders of transformers with the tensors of their cache as inputs and outputs: greedy generation in onnxruntime is PyTorch's."""

import numpy as np
import onnxruntime
import pytest
import torch
from stored_models import Linear
from torch import nn

from diffq_fx import ExportError, convert, prepare
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx import session_options
from diffq_fx.methods import STE

transformers = pytest.importorskip("transformers")

WORDS = 67
BODY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
GROUPED = {**BODY, "num_key_value_heads": 1}
OF_GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
SETTINGS = {
    "GPT2": OF_GPT,
    "Llama": {**GROUPED, "num_hidden_layers": 2},
    "OPT": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "Mistral": {**GROUPED, "sliding_window": 4},
    "Gemma3Text": {**GROUPED, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen2": {**GROUPED, "tie_word_embeddings": True},
    "Phi": BODY,
    "GPTNeoX": BODY,
    "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "GPTJ": {**OF_GPT, "rotary_dim": 4},
}


def decoder(name):
    config = getattr(transformers, f"{name}Config")(vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SETTINGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None  # every text goes on to the end
    return convert(prepare(model, {"input_ids": tokens(2, 6)}, STE(bits=4)))


def tokens(*shape):
    return torch.randint(3, WORDS, shape)


def generate(path, ids, mask, count):
    """Greedy generation in onnxruntime, with positions from the mask as ``generate`` of transformers has them."""
    session = onnxruntime.InferenceSession(path, session_options(path, exact=True))
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    given = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in inputs.items() if name.startswith("past")}
    ids, mask = new, _ = ids.numpy(), mask.numpy()
    for _ in range(count):
        given |= {"input_ids": new, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0)[:, -new.shape[1] :]}
        values = session.run(None, {name: given[name] for name in inputs})
        found = {entry.name: value for entry, value in zip(session.get_outputs(), values, strict=True)}
        given = {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
        new = found["logits"][:, -1:].argmax(-1)
        ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    return torch.from_numpy(ids)


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_is_that_of_torch(name, path):
    """Two texts, one padded on the left, at lengths that the example does not have, each step with what the last one has cached."""
    model = decoder(name)
    result = export_onnx(model, tokens(2, 6), path, cache=True)
    assert dict(result.sizes) == {"batch": 2, "sequence_length": 4, "past_sequence_length": 2}
    assert not result.remarks
    assert result.max_relative_error < 1e-5
    assert "forward" not in vars(model)
    for length in (3, 9):
        ids = tokens(2, length)
        ids[0, :2] = 0
        mask = (ids != 0).long()
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(generate(path, ids, mask, 5), expected)


def test_inputs_and_outputs_are_called_as_optimum_calls_them(path):
    export_onnx(decoder("GPT2"), {"input_ids": tokens(1, 5), "attention_mask": torch.ones(1, 5, dtype=torch.long)}, path, cache=True)
    session = onnxruntime.InferenceSession(path)
    total = "past_sequence_length + sequence_length"
    past, present = (["batch", 2, size, 8] for size in ("past_sequence_length", total))
    assert {entry.name: entry.shape for entry in session.get_inputs()} == {
        "input_ids": ["batch", "sequence_length"],
        "attention_mask": ["batch", total],
        "position_ids": ["batch", "sequence_length"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert {entry.name: entry.shape for entry in session.get_outputs()} == {
        "logits": ["batch", "sequence_length", WORDS],
        "present.0.key": present,
        "present.0.value": present,
    }
