"""The parts of the layout that decide: storage, cost, names of sizes."""

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_models import store

from diffq_fx.export.onnx.layout.emitter import integer_tensor
from diffq_fx.export.onnx.layout.table import Storage, one_container, read_table, split_by_width
from diffq_fx.export.onnx.naming import name_sizes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 300), st.sampled_from(["affine", "symmetric"]))
def test_parts_joined_in_order_are_the_weight(bits, columns, grid):
    weight = torch.linspace(-1, 2, len(bits) * columns).reshape(len(bits), columns)
    table = read_table(store(weight, torch.tensor(bits)[:, None], grid=grid))
    storage = split_by_width(table, "weight")
    joined = np.concatenate([storage.levels(rows) for rows in storage.parts.values()])
    assert np.array_equal(joined[np.argsort(np.argsort(storage.part_of_row, kind="stable"))], table.levels)
    assert all((storage.widths >= table.widths).tolist())
    assert storage.file_bytes <= one_container(table, "weight").file_bytes
    if grid == "affine":
        largest = 2 ** storage.widths.astype(np.int64) - 1
        assert ((table.levels >= 0) & (table.levels <= largest[:, None])).all()
    else:
        half = 2 ** (storage.widths.astype(np.int64) - 1)
        assert ((table.levels >= -half[:, None]) & (table.levels < half[:, None])).all()


def test_split_takes_the_smallest_of_all_storages():
    bits = torch.tensor([2, 4, 8, 16])[torch.randint(4, (300, 1))]
    table = read_table(store(torch.randn(300, 64), bits))
    found = split_by_width(table, "weight").file_bytes
    choices = []
    for narrower in product([False, True], repeat=3):
        offered = np.array([width for width, is_in in zip((2, 4, 8), narrower, strict=True) if is_in] + [16])
        choices.append(Storage(table, "weight", offered[np.searchsorted(offered, table.widths)]).file_bytes)
    assert found == min(choices)


@pytest.mark.parametrize(("form", "shape"), [("weight", (6, 10)), ("transposed", (10, 6)), ("rows", (6, 10))])
def test_forms(form, shape):
    table = read_table(store(torch.randn(6, 10), 4))
    storage = one_container(table, form)
    assert storage.shape == storage.levels().shape == shape
    scales = storage.groups(table.scale)
    assert scales.shape == ((1, 6) if form == "transposed" else (6, 1))
    assert storage.levels(np.array([1, 4])).shape[storage.axis] == 2


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_integer_tensors_hold_both_ends(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    levels = np.array([[low, high, 0], [high, low, high]])
    tensor = integer_tensor(levels, bits, signed=signed)
    proto = ir.to_proto(tensor)
    assert proto.raw_data
    assert np.array_equal(ir.from_proto(proto).numpy().astype(int), levels)


def test_names_of_sizes():
    x = ir.val("x", ir.DataType.FLOAT, ["s17", "s3", 8])
    y = ir.val("y", ir.DataType.FLOAT, ["s17", "4", "s9"])
    node = ir.node("Concat", [x, y], {"axis": 0})
    node.outputs[0].shape = ir.Shape(["2*s17", "s3 + s9", "s99"])
    graph = ir.Graph([x, y], node.outputs, nodes=[node], name="graph")
    name_sizes(graph)
    assert [str(value.shape) for value in (x, y, node.outputs[0])] == ["[batch,x_1,8]", "[batch,4,y_2]", "[2*batch,x_1 + y_2,s99]"]
