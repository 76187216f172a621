"""compress_blocks: each block as compress does it, on what the compressed blocks before it give; and batches of the model's own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffq_fx import DiffQConfig, bits_report
from diffq_fx.post_training import block_by_block
from diffq_fx.post_training.block_by_block import compress_blocks
from diffq_fx.post_training.samples import own_samples

transformers = pytest.importorskip("transformers")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, shift: Tensor, *, factor: float) -> tuple[Tensor, None]:
        return self.layer(x) * factor + shift, None


class Chain(nn.Module):
    """Blocks that give tuples and have an input and a keyword of their own."""

    def __init__(self, breaks: str = "") -> None:
        super().__init__()
        self.first, self.blocks, self.breaks = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(3)), breaks

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks[:2] if self.breaks == "one is not run" else self.blocks):
            state = {1} if self.breaks == "an object" else 1.0 + number
            x = block(x * 1 if self.breaks == "between" else x, shift=x.detach(), factor=state)[0]
        return x


def batches(count: int = 5) -> list[Tensor]:
    return list(torch.randn(count, 7, 16, generator=torch.Generator().manual_seed(0)))


def decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def test_each_block_has_the_inputs_that_the_compressed_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(Block):
        def forward(self, x: Tensor, shift: Tensor, *, factor: float) -> tuple[Tensor, None]:
            return 2 * x, None

    model, seen = Chain(), []

    def compress(block: nn.Module, calls: list, *_: object, **settings: object) -> nn.Module:
        assert block.layer.weight is model.blocks[len(seen)].layer.weight  # no copy of what is still to come
        assert settings["kind"] == "features"
        seen.append([call.args[0] for call in calls])
        assert all(call.kwargs["factor"] == len(seen) for call in calls)
        return Doubled()

    monkeypatch.setattr(block_by_block, "compress", compress)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = compress_blocks(model, batches(), "blocks.*")
    for batch, *hidden in zip(batches(), *seen, strict=True):
        first = model.first(batch)
        for number, each in enumerate(hidden):
            torch.testing.assert_close(each, first * 2**number)
        torch.testing.assert_close(converted(batch), first * 8)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    assert converted.first.weight is not model.first.weight


@pytest.mark.parametrize(
    ("breaks", "pattern", "message"),
    [
        ("", "layers.*", "no module is called 'layers.\\*'; lists of modules are: blocks"),
        ("between", "blocks.*", "no chain: at the call of 'blocks.1'"),
        ("one is not run", "blocks.*", "of 3 blocks called blocks.0, blocks.1, blocks.2 the model runs 2"),
        ("an object", "blocks.*", "'blocks.0' is called with a set"),
    ],
)
def test_what_is_no_chain_is_refused(breaks: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_blocks(Chain(breaks), batches(), pattern)


def test_an_error_within_a_block_names_it() -> None:
    with pytest.raises(ValueError, match=r"compress_blocks: block 'blocks\.0', within which weights have their names: .*'none'"):
        compress_blocks(Chain(), batches(), "blocks.*", DiffQConfig(target_bits=4, exclude=("none",)))


def test_bad_limits_are_met_first() -> None:
    with pytest.raises(ValueError, match="minutes must be a positive number, got '3'"):
        compress_blocks(Chain("between"), batches(), "blocks.*", minutes="3")  # pyright: ignore[reportArgumentType]


def test_a_decoder_on_its_own_samples() -> None:
    model, before = decoder(), torch.get_rng_state()
    samples = own_samples(model, count=5, tokens=6, rows=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(batch["input_ids"].shape) for batch in samples] == [(1, 6)] * 5
    again = own_samples(model, count=5, tokens=6, rows=2)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(samples, again, strict=True))
    with pytest.raises(ValueError, match="DynamicCache, which it may change"):
        compress_blocks(model, samples, "model.layers.*", progress=False)
    without = [{**batch, "use_cache": False} for batch in samples]
    converted = compress_blocks(model, without, "model.layers.*", DiffQConfig(target_bits=5), steps=0, progress=False)
    report = bits_report(converted)
    assert {weight.name.split(".")[2] for weight in report.weights} == {"0", "1"}
    assert 4.5 < report.average_bits_in_all <= 5
    ids = samples[0]["input_ids"]
    assert float((converted(ids).logits - model(ids).logits).detach().abs().mean()) < 0.1 * float(model(ids).logits.detach().std())


@pytest.mark.parametrize(
    ("model", "settings", "error", "says"),
    [
        (nn.Linear(2, 2), {}, TypeError, "a causal language model"),
        (None, {"tokens": 1}, ValueError, "tokens must be a whole number of at least 2"),
        (None, {"tokens": 65}, ValueError, "tokens must be a whole number from 2 to 64, got 65"),
    ],
)
def test_own_samples_refuse(model: nn.Module | None, settings: dict[str, int], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"own_samples: {says}"):
        own_samples(model or decoder(), **settings)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_is_saved_with_its_blocks(tied: bool, tmp_path: Path) -> None:
    """save_pretrained wrote names that from_pretrained does not know, and it filled the layers with random numbers."""
    import diffq_fx.integrations.transformers  # noqa: F401

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tied))
    inputs = [{**each, "use_cache": False} for each in own_samples(model, count=4, tokens=8)]
    compressed = compress_blocks(model, inputs, "model.layers.*", DiffQConfig(target_bits=6), steps=0, progress=False)
    compressed.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs[0]).logits, compressed(**inputs[0]).logits)
    assert bits_report(loaded).packed_size == bits_report(compressed).packed_size
