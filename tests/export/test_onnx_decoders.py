"""Decoders of transformers with the tensors of their cache as inputs and outputs: greedy generation in onnxruntime is PyTorch's."""

from types import SimpleNamespace

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
    "Gemma3Text": {
        **GROUPED,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
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


class WithoutCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 16), Linear(16, WORDS, 4)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


class Stateful(WithoutCache):
    """Returns whatever its ``layer`` is as the cache of its layers."""

    layer: object = None

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        cache = self.layer and SimpleNamespace(layers=[self.layer])
        return SimpleNamespace(logits=super().forward(input_ids), past_key_values=cache)


class WithStates(Stateful):
    layer = SimpleNamespace(conv_states=torch.zeros(2, 16), recurrent_states=torch.zeros(2, 16))


class Window(Stateful):
    layer = SimpleNamespace(keys=torch.zeros(2, 1, 1, 8), values=torch.zeros(2, 1, 1, 8))


class WithEncoder(Stateful):
    config = SimpleNamespace(is_encoder_decoder=True)


class Picky(Stateful):
    def forward(self, input_ids, past_key_values=None, use_cache=None):
        raise ValueError("You have to specify decoder_input_ids")


IDS = tokens(2, 6)


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "says"),
    [
        (WithoutCache, IDS, {}, ExportError, "the WithoutCache has no cache: its forward takes no 'past_key_values'. Leave cache out"),
        (Stateful, IDS, {}, ExportError, "the Stateful has no cache: use_cache=True makes it return no 'past_key_values'. Leave cache"),
        (WithStates, IDS, {}, ExportError, "layer 0 of the cache of the WithStates does not hold keys and values of every token"),
        (Window, IDS, {}, ExportError, "layer 0 of the cache of the Window does not hold keys and values of every token"),
        (
            WithEncoder,
            IDS,
            {},
            ExportError,
            "the WithEncoder has an encoder, whose keys and values no decoder's cache has. Leave cache out",
        ),
        (Picky, IDS, {}, ExportError, "the Picky does not run on the first 2 tokens of example_inputs: You have to specify decoder_"),
        (Stateful, tokens(2, 4), {}, ExportError, r"'input_ids' of shape \(batch, 5 or more\), got \[2, 4\]"),
        (Stateful, torch.randn(2, 6, 8), {}, ExportError, r"'input_ids' of shape \(batch, 5 or more\), got \[2, 6, 8\]"),
        (Stateful, {"attention_mask": IDS}, {}, ExportError, "does not take example_inputs: missing a required argument: 'input_ids'"),
        (
            Stateful,
            {"input_ids": IDS, "attention_mask": torch.ones(2, 7)},
            {},
            ExportError,
            r"a value for each token, but 'attention_mask' has shape \[2, 7\] for 'input_ids' of \[2, 6\]",
        ),
        (Stateful, {"input_ids": IDS, "past_key_values": IDS}, {}, ExportError, "leave 'past_key_values' out of example_inputs"),
        (Stateful, IDS, {"dynamic_shapes": ({},)}, ValueError, "cache=True .* does not go together with dynamic_shapes"),
        (Stateful, IDS, {"activations": "int8", "calibration": [IDS]}, ValueError, 'does not go together with activations="int8"'),
        (lambda: decoder("GPT2"), IDS, {"input_names": ["ids", "mask"]}, ValueError, r"input_names has 2 names .* for 5 inputs"),
        (
            lambda: decoder("GPT2"),
            IDS,
            {"output_names": {"past": "x"}},
            ExportError,
            "renames 'past', .* 'present.0.key', 'present.0.value'",
        ),
    ],
)
def test_bad_input(model, example, options, error, says, old_file):
    """One sentence each; the old file is as it was, and so is the model."""
    made = model().eval()
    with pytest.raises(error, match=says):
        export_onnx(made, example, old_file, cache=True, **options)
    assert "forward" not in vars(made)


class FixedLength(nn.Module):
    """A decoder whose code fixes what is new to the four tokens of the example."""

    def __init__(self):
        super().__init__()
        self.model = decoder("GPT2")

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        returned = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        if past_key_values is not None:
            returned.logits = returned.logits + torch.arange(4.0)[:, None]
        return returned


def test_lengths_that_the_model_fixes(old_file):
    with pytest.raises(ExportError, match="the size input_ids.1 must be dynamic: the model fixes it"):
        export_onnx(FixedLength().eval(), IDS, old_file, cache=True)
