"""Codebooks in packed files: LC and product quantization come back bit by bit, and take what they say."""

import pytest
import torch
from packed_models import assert_equal, converted, expected, float_twin
from torch import nn

from diffq_fx import bits_report, convert, prepare
from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.export.packed.inspection import inspect_packed
from diffq_fx.export.packed.kinds.codebooks import PackedCodebook
from diffq_fx.methods import LC, STE, ProductQuantization
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.weights import WeightSpec


def coded(name, shape, entries, block, *, axis=0, dtype=torch.float32, entry_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = WeightSpec(name=name, shape=shape, axis=axis, dtype=dtype)
    codes = torch.randint(entries, (spec.rows, -(-spec.columns // block)), generator=generator)
    codebook, scale = torch.randn(entries, block, generator=generator), None
    if entry_dtype == torch.int8:
        codebook, scale = (codebook * 30).clamp(-127, 127), torch.tensor(0.013)
    return CodebookWeight(spec, codes, codebook.to(entry_dtype), scale)


@pytest.mark.parametrize("compression", ["entropy", "bits"])
@pytest.mark.parametrize("entry_dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("many_parts", [False, True])
def test_every_codebook_comes_back(tmp_path, many_parts, entry_dtype, compression, monkeypatch):
    if many_parts:
        monkeypatch.setattr("diffq_fx.export.packed.shards._PART_CODES", 300)
        monkeypatch.setattr("diffq_fx.export.packed.saving._LEAST_CODES", 1 << 9)
    settings = [
        ("one", (9, 30), 1, 1, 0, torch.float32),
        ("two", (40, 30), 2, 1, 0, torch.float32),
        ("three", (7, 50, 3), 3, 4, 1, torch.float16),
        ("blocks", (64, 61), 256, 8, 0, torch.float32),
        ("long", (5, 3), 5, 7, 0, torch.bfloat16),
        ("many", (30, 40), 300, 3, 1, torch.float64),
    ]
    weights = [coded(n, s, k, d, axis=a, dtype=t, entry_dtype=entry_dtype, seed=i) for i, (n, s, k, d, a, t) in enumerate(settings)]
    model, path = converted(*weights), tmp_path / "m.safetensors"
    save_packed(model, path, compression)
    assert_equal(load_packed(path), expected(model))
    assert_equal(load_packed(float_twin(model), path).state_dict(), expected(model))
    others = [coded(n, s, k, d, axis=a, dtype=t, entry_dtype=entry_dtype, seed=99) for n, s, k, d, a, t in settings]
    assert_equal(load_packed(converted(*others), path).state_dict(), model.state_dict())
    assert inspect_packed(path).shards >= (2 if many_parts else 1)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))


@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_model_of_several_methods(tmp_path, scope):
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 5))
    mapping = {"0": ProductQuantization(entries=32, entry_dtype="int8"), "1": LC(entries=3), "*": STE(bits=4)}
    model = convert(prepare(Net(), ids, mapping, scope=scope))
    path = tmp_path / "m.safetensors"
    save_packed(model, path)
    torch.manual_seed(1)
    other = load_packed(convert(prepare(Net(), ids, mapping, scope=scope)), path)
    assert torch.equal(other(ids), model(ids))
    assert torch.equal(load_packed(Net(), path)(ids), model(ids))


def test_the_file_takes_what_the_report_says(tmp_path):
    net = nn.Linear(512, 512, bias=False)
    model = convert(prepare(net, torch.zeros(1, 512), ProductQuantization(entries=256, block_size=8, iterations=2)))
    path = tmp_path / "m.safetensors"
    save_packed(model, path, "bits")
    size = bits_report(model).packed_size.total_bits // 8
    assert size == 512 * 512 // 8 + 256 * 8 * 4
    assert size <= path.stat().st_size < size + 1500


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"entries": 0, "block_size": 1, "entry_dtype": "float32"},
        {"entries": 2, "block_size": 0, "entry_dtype": "float32"},
        {"entries": 1 << 17, "block_size": 1, "entry_dtype": "float32"},
        {"entries": True, "block_size": 1, "entry_dtype": "float32"},
        {"entries": 2, "block_size": 1, "entry_dtype": "int4"},
        {"entries": 2, "block_size": 1, "entry_dtype": ["float32"]},
    ],
)
def test_facts_that_are_not_possible(facts):
    with pytest.raises(PackedFileError, match="is not possible"):
        PackedCodebook.of_facts(WeightSpec(name="w", shape=(2, 2), axis=0), facts)


def test_a_code_beyond_the_codebook():
    stored = coded("w", (4, 4), 3, 1)
    kind = PackedCodebook.of_stored(stored)
    part = kind.encode(stored, slice(0, 4))
    part.codes[2, 1] = 3
    for read in (kind.weight_rows, lambda bad: kind.restore([bad])):
        with pytest.raises(PackedFileError, match="weight 'w': a code names an entry that its codebook of 3 does not have"):
            read(part)
