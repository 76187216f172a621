"""What the demos do with a float and a converted model: files of ours and of onnxruntime's quantizers, raced, scored and shown."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from diffq_fx.export.onnx.benchmark import Quartiles
from diffq_fx.export.onnx.files import load_graph
from diffq_fx.export.onnx.sessions import open_session, session_entries
from diffq_fx.export.onnx.timing import time_in_turns
from diffq_fx.export.onnx.translation import quiet
from diffq_fx.report import BitsReport

BATCHES = (1, 16)
_TURNS, _SECONDS = 100, 8.0
"""Of a race at one size of the batch: the most turns, and after how long no other begins."""
_BLOCK = 32
"""Weights that share a scale in onnxruntime's 4-bit files."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """ONNX files of one model, what to run them on, and how to judge what they compute."""

    title: str
    files: dict[str, Path]
    """How it was made -> file; float first."""
    inputs: tuple[Tensor, ...]
    """At least 16 rows."""
    unit: str
    """What a row of the inputs is."""
    scores: Callable[[Callable[..., Tensor]], dict[str, str]]
    """Heading -> figure, of a function that computes what a file does."""
    report: BitsReport


def show(contest: Contest, out: Path, console: Console) -> None:
    """Score and race the files, print one table, and write it into report.html and results.json."""
    rows = measure(contest)
    console.print(Text(contest.title), soft_wrap=True)  # Text: square brackets are markup to rich
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in rows[0]:
        is_name = heading == "file"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    console.print(table)
    contest.report.save_page(out / "report.html", measurements=rows)
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(contest: Contest) -> list[dict[str, str]]:
    """A row for each file: size, scores, median latency [quartiles] at each size of the batch."""
    # as its user runs a file: with the options that it asks for
    sessions = [open_session(path, 0, session_entries(load_graph(path))) for path in contest.files.values()]
    rows = []
    for (name, path), session in zip(contest.files.items(), sessions, strict=True):
        scores = contest.scores(partial(compute, session))
        rows.append({"file": name, "MiB": f"{path.stat().st_size / 2**20:.2f}", **scores})
    for batch in BATCHES:
        runs = [partial(session.run, None, feed(session, [each[:batch] for each in contest.inputs])) for session in sessions]
        times = time_in_turns(runs, turns=_TURNS, seconds=_SECONDS)
        for row, own in zip(rows, times, strict=True):
            row[f"ms, {batch} {contest.unit}" + "s" * (batch > 1)] = Quartiles.of([1e3 * each for each in own]).text(".3g")
    return rows


def feed(session: Any, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Inputs by the names that the file has for them."""
    return {entry.name: each.numpy() for entry, each in zip(session.get_inputs(), inputs, strict=True)}


def compute(session: Any, *inputs: Tensor) -> Tensor:
    """The file's output."""
    return torch.from_numpy(session.run(None, feed(session, inputs))[0])


def export_float(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], path: Path) -> None:
    """The float model as torch exports it, of inputs with one row or more."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    two = tuple(torch.cat([each[:1], each[:1]]) for each in inputs)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch")
    with quiet():
        torch.onnx.export(model, two, path, dynamo=True, dynamic_shapes=tuple({0: batch} for _ in two), external_data=False, verbose=False)


def quantize_to_int8(source: Path, path: Path) -> None:
    """onnxruntime's ``quantize_dynamic`` as its documentation advises: after its preprocessing, with a scale per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(preprocessed(source), path, weight_type=QuantType.QInt8, per_channel=True)


def preprocessed(source: Path) -> Any:
    """The model of a file after onnxruntime's preprocessing, whose optimizer leaves shapes of values that it has turned."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    between = source.with_suffix(".preprocessed.onnx")
    quant_pre_process(source, between, skip_symbolic_shape=True)
    model = onnx.load(between)
    between.unlink()
    del model.graph.value_info[:]
    return model


def quantize_to_4_bits(source: Path, path: Path) -> None:
    """onnxruntime's MatMulNBits with activations in int8 inside the products, its fastest; rows that are looked up have 4 bits, too."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    axes = {"MatMul": 0, "Gather": 1}
    settings = {"bits": 4, "block_size": _BLOCK, "is_symmetric": False, "accuracy_level": 4}
    with quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(source), **settings, op_types_to_quantize=tuple(axes), quant_axes=tuple(axes.items()))
        quantizer.process()
    wrapped: Any = quantizer.model  # declared as a ModelProto, which it no longer is
    wrapped.save_model_to_file(str(path), False)
