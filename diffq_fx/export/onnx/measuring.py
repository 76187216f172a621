"""Measures the forms of a product in onnxruntime on the machine that exports: ``export_onnx(target="this-machine")``."""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse
from diffq_fx.export.onnx.layout.cost import FLOAT, Kernel, Machine, Machines, Measurement, Product
from diffq_fx.export.onnx.layout.emitter import Emitter, make_node
from diffq_fx.export.onnx.layout.linear import emit_fused
from diffq_fx.export.onnx.layout.products import choose_form, emit_dynamic, emit_factor
from diffq_fx.export.onnx.layout.profiles import KINDS, THIS_MACHINE
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable, one_container
from diffq_fx.export.onnx.opset import set_opset
from diffq_fx.export.onnx.sessions import open_session, wanted_entries
from diffq_fx.export.onnx.timing import Clock, Run, time_in_turns
from diffq_fx.export.onnx.translation import BASE_OPSET
from diffq_fx.storage.packing import container_for
from diffq_fx.weights import WeightSpec

_log = logging.getLogger(__name__)

_SECONDS = 0.15
"""For the turns of one product; most models have less than a dozen different ones."""
_TURNS = 41
_LIMIT_SECONDS = 20.0
"""After so long in all, the portable profiles decide about what is not measured yet."""
_LONG_SECONDS = 3.0
"""A measurement that takes longer tells of its progress as a warning of the log."""
_MOST_WEIGHTS, _MOST_PRODUCTS = 2**24, 2**31
"""Of a larger product a part is measured: its outputs, then its rows, are cut; the time grows in proportion."""
_LEAST_OUTPUTS = 64


def machines_of(target: str) -> Machines:
    """What tells the times of a product for a target of ``export_onnx``."""
    return Stopwatch() if target == THIS_MACHINE else lambda product, kernels: KINDS[target]


class Stopwatch:
    """Measures each different product once, when its times are first asked for: all forms in turns, medians."""

    def __init__(self, clock: Clock = time.perf_counter, prepare: Callable[[Kernel, Product], Run] | None = None) -> None:
        self.skipped: set[Product] = set()
        """What was not measured, for the time was over."""
        self._clock = clock
        self._prepare = prepare or prepare_run
        self._known: dict[tuple[Product, tuple[Kernel, ...]], Measurement] = {}
        self._spent = 0.0

    def __call__(self, product: Product, kernels: Sequence[Kernel]) -> Sequence[Machine]:
        """This machine, or the portable profiles when the time for measuring is over."""
        product = product._replace(is_open=False)
        key = (product, tuple(kernels))
        if key not in self._known:
            if self._spent > _LIMIT_SECONDS:
                self.skipped.add(product)
                return KINDS["portable"]
            start = self._clock()
            self._known[key] = Measurement(self._measure(product, (FLOAT, *kernels)))
            self._spent += self._clock() - start
            level = logging.WARNING if self._spent > _LONG_SECONDS else logging.INFO
            message = "measured %d products in %.1f s, the last one with %d inputs, %d outputs and %d rows; %.0f s are the limit"
            _log.log(level, message, len(self._known), self._spent, product.inputs, product.outputs, product.rows, _LIMIT_SECONDS)
        return [self._known[key]]

    def _measure(self, product: Product, kernels: Sequence[Kernel]) -> dict[Kernel, float]:
        part = _part(product)
        runs = [self._prepare(kernel, part) for kernel in kernels]
        times = time_in_turns(runs, turns=_TURNS, seconds=_SECONDS, clock=self._clock)
        scale = 1e6 * product.rows * product.outputs / (part.rows * part.outputs)
        return {kernel: scale * statistics.median(found) for kernel, found in zip(kernels, times, strict=True)}


def _part(product: Product) -> Product:
    """As much of a product as can be measured in short time and little memory."""
    rows, inputs, outputs, _ = product
    fitting = min(_MOST_WEIGHTS // inputs, _MOST_PRODUCTS // (rows * inputs))
    if fitting < outputs:
        outputs = min(outputs, max(_LEAST_OUTPUTS, fitting // _LEAST_OUTPUTS * _LEAST_OUTPUTS))
    return Product(max(1, min(rows, _MOST_PRODUCTS // (inputs * outputs))), inputs, outputs)


def prepare_run(kernel: Kernel, product: Product, *, threads: int = 0) -> Run:
    """Load a model of one product in one form, as ``export_onnx`` would write it; what is returned runs it once on random inputs.

    At 2 bits the number of outputs is a multiple of 4.

    Example:
        >>> prepare_run(Kernel("fused 4", 32), Product(2, 64, 64))()[0].shape
        (2, 64)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "product.onnx")
        ir.save(product_model(kernel, product), path)
        session = open_session(path, threads, wanted_entries("onnxruntime"))
    inputs = np.random.default_rng(0).standard_normal((product.rows, product.inputs), dtype=np.float32)
    return partial(session.run, None, {"x": inputs})


def product_model(kernel: Kernel, product: Product) -> ir.Model:
    """A model of one product in one form."""
    x = ir.val("x", ir.DataType.FLOAT, [product.rows, product.inputs])
    weight = ir.val("weight", ir.DataType.FLOAT, [product.inputs, product.outputs])
    node = make_node("MatMul", [x, weight], "y")
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([product.rows, product.outputs])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": BASE_OPSET}, name="product")
    rng = np.random.default_rng(0)
    if kernel == FLOAT:
        weight.const_value = ir.tensor(rng.standard_normal((product.inputs, product.outputs), dtype=np.float32), name="weight")
        graph.register_initializer(weight)
    else:
        emitter = Emitter(graph)
        table = _random_table(kernel, product, rng)
        stored = StoredTable(emitter, one_container(table, "weight"))
        use = LinearUse(node, x, None, transposed=False, rows=None)
        if kernel.block:
            emit_fused(stored, use, kernel, copy=0)
        else:
            emit_dynamic(stored, emit_factor(stored, choose_form(table)), use)
        emitter.flush()
    model = ir.Model(graph, ir_version=10)
    set_opset(model, None)
    return model


def _random_table(kernel: Kernel, product: Product, rng: np.random.Generator) -> WeightTable:
    """Levels over the whole range of a kernel's width, and zero points where it has them."""
    signed = kernel.name == "dynamic int8"
    bits = kernel.bits if kernel.block else 7 if signed else 8
    spec = WeightSpec(name="weight", shape=(product.inputs, product.outputs), axis=1, grid="symmetric" if signed else "affine")
    levels = rng.integers(0, 2**bits, (product.outputs, product.inputs), dtype=np.uint8).astype(np.int32)
    middle = 2 ** (bits - 1)
    per_channel = (product.outputs, 1)
    return WeightTable(
        spec=spec,
        levels=levels - middle if signed else levels,
        scale=np.full(per_channel, 1.0 / (middle * product.inputs**0.5), dtype=np.float32),
        zero_point=None if signed else np.full(per_channel, middle - 1, dtype=np.int32),
        widths=np.full(product.outputs, container_for(bits)),
        most_bits=bits,
    )
