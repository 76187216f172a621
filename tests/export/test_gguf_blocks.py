"""Each block of a GGUF file has exactly the levels and scales of the weight, in the smallest type that holds them; or the weight is refused."""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

import gguf

from diffq_fx import ExportError
from diffq_fx.export.gguf.blocks import TYPES, BlockedWeight
from diffq_fx.functional import QuantParams
from diffq_fx.storage import IntegerWeight
from diffq_fx.weights import WeightSpec


def stored(bits, grid, *, shape=(6, 96), range_size=32, zero=None, scale=None):
    """A weight whose first row has the lowest and the highest level."""
    generator = torch.Generator().manual_seed(bits)
    spec = WeightSpec(name="layer.weight", shape=shape, axis=0, group_size="tensor", range_size=range_size, grid=grid)
    levels = torch.randint(2**bits, shape, generator=generator, dtype=torch.int32)
    levels[0, :2] = torch.tensor([0, 2**bits - 1])
    layout = spec.scale_layout.shape
    scale = torch.rand(layout, generator=generator).add_(0.01).half().float() if scale is None else torch.full(layout, scale)
    if grid == "float":
        params = QuantParams(scale, None, torch.randn(layout, generator=generator).half().float())
    else:
        middle = 2 ** (bits - 1)
        zero_point = torch.full(layout, middle, dtype=torch.int32)
        if grid != "symmetric":
            zero_point = (
                torch.randint(2**bits, layout, generator=generator, dtype=torch.int32) if zero is None else zero_point - middle + zero
            )
        params = QuantParams(scale, zero_point / 2 if grid == "half" else zero_point, None)
    return IntegerWeight(spec, levels, params, torch.full((1, 1), bits))


def assert_exact(weight):
    """By the package's own reading of the bytes."""
    blocked = BlockedWeight(weight)
    values = gguf.quants.dequantize(blocked.data(), gguf.GGMLQuantizationType[blocked.type.name])
    assert np.array_equal(values.view(np.uint32) & 0x7FFFFFFF, weight().numpy().view(np.uint32) & 0x7FFFFFFF)  # -0 is 0
    assert np.array_equal(np.signbit(values[values != 0]), np.signbit(weight().numpy()[values != 0]))
    return blocked


@pytest.mark.parametrize(
    ("bits", "grid", "expected"),
    [
        (1, "symmetric", "Q4_0"),
        (2, "symmetric", "Q4_0"),
        (3, "symmetric", "Q4_0"),
        (4, "symmetric", "Q4_0"),
        (5, "symmetric", "Q5_0"),
        (6, "symmetric", "Q8_0"),
        (8, "symmetric", "Q8_0"),
        (2, "half", "Q4_0"),
        (3, "affine", "Q4_0"),
        (4, "affine", "Q5_0"),
        (5, "affine", "Q8_0"),
        (7, "affine", "Q8_0"),
        (2, "float", "Q4_1"),
        (4, "float", "Q4_1"),
        (5, "float", "Q5_1"),
    ],
)
@pytest.mark.parametrize("range_size", [32, 64, "channel", "tensor"])
def test_the_smallest_type_that_holds_a_weight(bits, grid, expected, range_size):
    assert assert_exact(stored(bits, grid, range_size=range_size)).type.name == expected


@pytest.mark.parametrize(("bits", "expected", "otherwise"), [(4, "Q4_1", "Q5_0"), (5, "Q5_1", "Q8_0")])
def test_a_minimum_that_is_a_float16_value_saves_space(bits, expected, otherwise):
    """A scale of few significant bits times any zero point is such a value; a scale of eleven times an odd zero point is none."""
    zero = 2**bits - 1
    assert assert_exact(stored(bits, "affine", scale=65 / 64 if bits == 4 else 33 / 32, zero=zero)).type.name == expected
    assert assert_exact(stored(bits, "affine", scale=1 + 2**-10, zero=zero)).type.name == otherwise


def test_levels_and_scales_are_those_of_the_weight():
    """Without the package: two bytes of scale, then the levels of weights k and k + 16 in one byte, as llama.cpp has them."""
    weight = stored(4, "symmetric")
    blocks = BlockedWeight(weight).data().reshape(6, 3, 18)
    assert np.array_equal(blocks[..., :2].copy().view("<f2")[..., 0], weight.scale.numpy().astype(np.float16))
    levels = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    assert np.array_equal(levels.reshape(6, 96), weight.levels_OI().numpy())


def test_a_large_weight_is_read_in_pieces():
    weight = stored(4, "symmetric", shape=(4100, 128))
    assert len([*weight.spec.scale_layout.row_slices(torch.device("cpu"))]) > 1
    assert_exact(weight)


def test_bytes_of_a_block_are_those_of_the_package():
    for each in TYPES:
        assert (32, each.block_bytes) == gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each.name]]


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: stored(4, "symmetric", shape=(6, 100)), r"'layer.weight' has rows of 100 inputs.*blocks of 32. Exclude it"),
        (lambda: stored(4, "symmetric", range_size=16), r"has a scale for each 16 inputs, and GGUF one for 32. Prepare with .*for_runtime"),
        (lambda: stored(4, "symmetric", range_size=48), r"has a scale for each 48 inputs"),
        (lambda: stored(4, "symmetric", scale=0.1), r'18 of its 18 scales are no float16 values, first 0.1000.*scale_dtype="float16"'),
        (lambda: stored(4, "symmetric", scale=1e6), r"18 of its 18 scales are no float16 values, first 1000000.0"),
        (
            lambda: stored(9, "symmetric"),
            r"needs integers from -256 to 255 times its scales; Q8_0, .*-128 to 127. Prepare with.*of up to 8 bits",
        ),
        (lambda: stored(8, "affine", zero=0), r'needs integers from 0 to 255 .*grid="symmetric"'),
        (lambda: stored(8, "float"), r"integers from 0 to 255 times its scales; Q5_1, .* has 0 to 31"),
    ],
)
def test_what_no_type_holds_is_refused_by_name(weight, says):
    with pytest.raises(ExportError, match=says):
        BlockedWeight(weight())
