"""Converted models made by hand, and their float twins."""

import torch
from torch import nn

from diffq_fx import functional
from diffq_fx.export import load_packed, save_packed
from diffq_fx.functional.groups import to_rows
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.weights import WeightSpec


def store(
    name,
    shape,
    *,
    axis=0,
    bits=(2, 8),
    group="channel",
    ranges=None,
    grid="affine",
    dtype=torch.float32,
    aliases=(),
    seed=0,
    spread=1.0,
    scale_dtype=torch.float32,
):
    """A random weight on its grid: ``bits`` is a number, or the limits of random widths."""
    generator = torch.Generator().manual_seed(seed)
    ranges = group if ranges is None else ranges
    spec = WeightSpec(
        name=name,
        aliases=aliases,
        shape=shape,
        axis=axis,
        dtype=dtype,
        group_size=group,
        range_size=ranges,
        grid=grid,
        consumer="linear",
        scale_dtype=scale_dtype,
    )
    weight = (torch.randn(shape, generator=generator) * spread).to(dtype)
    low, high = (bits, bits) if isinstance(bits, int) else bits
    widths = torch.randint(low, high + 1, spec.bits_layout.shape, generator=generator, dtype=torch.int32)
    rows = to_rows(weight, axis)
    params = functional.quant_params(*functional.grid_range(*spec.range_layout.aminmax(rows), grid), widths, grid, scale_dtype)
    return IntegerWeight(spec, functional.quantize(rows.to(params.scale.dtype), params, widths, spec.scale_layout), params, widths)


def store_codes(name, shape, *, axis=0, entries=16, block=1, entry_dtype=torch.float32, dtype=torch.float32, aliases=(), seed=0):
    """A random weight of codes; int8 entries have a scale. Every entry is drawn with another probability."""
    generator = torch.Generator().manual_seed(seed)
    spec = WeightSpec(
        name=name, aliases=aliases, shape=shape, axis=axis, dtype=dtype, group_size="tensor", range_size="tensor", grid="symmetric"
    )
    codebook = torch.randn(entries, block, generator=generator)
    codebook, scale = (
        ((codebook * 40).clamp(-127, 127).to(torch.int8), torch.tensor(0.0123))
        if entry_dtype == torch.int8
        else (codebook.to(entry_dtype), None)
    )
    count = spec.rows * -(-spec.columns // block)
    codes = torch.multinomial(torch.linspace(1, 3, entries), count, replacement=True, generator=generator)
    return CodebookWeight(spec, codes.reshape(spec.rows, -1), codebook, scale)


def owner(model, name):
    """The submodule that holds ``name``, made where it is missing."""
    *path, last = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]
    return model, last


def converted(*stored, **buffers):
    """A model that holds stored weights as convert_diffq leaves them, and buffers."""
    model = nn.Module()
    for weight in stored:
        for name in weight.spec.names:
            module, last = owner(model, name)
            module.add_module(f"{last}_quantized", weight)
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model.eval()


def float_twin(model, tie=True):
    """The float architecture of a converted model, full of sevens."""
    twin = nn.Module()
    for weight in {id(m): m for m in model.modules() if isinstance(m, StoredWeight)}.values():
        parameter = nn.Parameter(torch.full(weight.spec.shape, 7.0, dtype=weight.spec.dtype))
        for name in weight.spec.names:
            module, last = owner(twin, name)
            module.register_parameter(last, parameter if tie else nn.Parameter(parameter.detach().clone()))
    for name, value in model.named_buffers(recurse=False):
        twin.register_buffer(name, torch.full_like(value, 1))
    return twin


def expected(model):
    """What loading must give: every weight and buffer by name."""
    weights = {name: m() for m in model.modules() if isinstance(m, StoredWeight) for name in m.spec.names}
    return weights | dict(model.named_buffers(recurse=False))


def round_trip(model, path, compression="entropy"):
    """Save, load by all three roads and compare; the converted model that is loaded into holds integers before."""
    save_packed(model, path, compression)
    wanted = expected(model)
    assert_equal(load_packed(path), wanted)
    assert_equal(load_packed(float_twin(model), path).state_dict(), wanted)
    other = converted(
        *(
            store(m.spec.name, m.spec.shape, axis=m.spec.axis, aliases=m.spec.aliases, dtype=m.spec.dtype, seed=99)
            for m in stored_in(model)
        ),
        **{name: torch.zeros_like(value) for name, value in model.named_buffers(recurse=False)},
    )
    assert_equal(load_packed(other, path).state_dict(), model.state_dict())
    for name, module in other.named_modules():
        if isinstance(module, StoredWeight):
            assert type(module) is type(model.get_submodule(name))
            assert module.spec == model.get_submodule(name).spec


def stored_in(model):
    """Every stored weight once."""
    return {id(m): m for m in model.modules() if isinstance(m, StoredWeight)}.values()


def assert_equal(found, wanted):
    """The same names, and bit by bit the same values."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(bits_of(found[name]), bits_of(value)), name


def bits_of(tensor):
    """The bytes of a tensor: they tell 0 from -0, and NaN from NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
