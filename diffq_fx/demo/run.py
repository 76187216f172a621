"""Run the demo's tasks and show what came of them."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from diffq_fx.convert import convert_diffq
from diffq_fx.demo.tasks import Task, digits, prose
from diffq_fx.demo.training import accuracy, train
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.prepare import prepare_diffq
from diffq_fx.report import bits_report

TARGET_BITS = 4
"""Average bits per weight, scales included."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """Our ONNX file against the float one: sizes in MiB, latencies in ms at batch 1."""

    accuracy_onnx: float
    mib_onnx: float
    mib_float_onnx: float
    latency_float: float
    latency_ours: float
    ratio: float
    """Float latency over ours, median of the pairs."""
    ratio_q1: float
    ratio_q3: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """One task's figures: accuracies in percent, sizes in MiB."""

    task: str
    accuracy_float: float
    accuracy_prepared: float
    accuracy_converted: float
    average_bits: float
    """Bits per quantized weight, everything that is stored for them included."""
    mib_bit_packed: float
    race: Race


def run(*, out: Path, quick: bool = False) -> list[DemoResult]:
    """Train, compress, export and race a convolutional net and a transformer on real data.

    Args:
        out: folder for the ONNX files, the pictures and ``results.json``; made if it is not there.
        quick: fewer epochs, to see it work and not its accuracy.

    Returns:
        One result per task.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    results = [_run_task(task, out, console) for task in (digits(quick), prose(quick))]
    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    console.print(_table(results))
    console.print(f"ONNX files, pictures of where the bits went, and results.json are in {out}")
    return results


def _run_task(task: Task, out: Path, console: Console) -> DemoResult:
    torch.manual_seed(0)
    example = task.test[0][:1]
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        model = task.make_model()
        _with_progress(progress, f"{task.name}: train float", task, model, task.float_epochs, task.learning_rate)
        float_model = copy.deepcopy(model).eval()
        steps = task.compress_epochs * task.steps_per_epoch()
        prepared = prepare_diffq(model, example, DiffQConfig(target_bits=TARGET_BITS, training_steps=steps))
        rate = task.learning_rate / 2
        _with_progress(progress, f"{task.name}: train prepared", task, prepared, task.compress_epochs, rate)
        finish = progress.add_task(f"{task.name}: convert, export, race", total=4)
        converted = convert_diffq(prepared)
        progress.advance(finish)
        race = _export_and_race(task, float_model, converted, out, lambda: progress.advance(finish))
    report = bits_report(prepared)
    report.save_picture(out / f"{task.name}-bits.png")
    return DemoResult(
        task=task.name,
        accuracy_float=accuracy(float_model, task),
        accuracy_prepared=accuracy(prepared.eval(), task),
        accuracy_converted=accuracy(converted, task),
        average_bits=report.average_bits_in_all,
        mib_bit_packed=report.packed_size.total_mib,
        race=race,
    )


def _with_progress(progress: Progress, title: str, task: Task, model: nn.Module, epochs: int, learning_rate: float) -> None:
    """Train under a progress bar."""
    bar = progress.add_task(title, total=epochs * task.steps_per_epoch())
    train(model, task, epochs, learning_rate, lambda: progress.advance(bar))


def _export_and_race(task: Task, float_model: nn.Module, converted: nn.Module, out: Path, advance: Callable[[], None]) -> Race:
    """Write both ONNX files, compare their speed at batch 1, and test ours."""
    from diffq_fx.export import export_onnx
    from diffq_fx.export.onnx.benchmark import compare_latency

    example = task.test[0][:1]
    ours, theirs = out / f"{task.name}.onnx", out / f"{task.name}-float.onnx"
    export_onnx(converted, example, ours)
    advance()
    export_float(float_model, example, theirs)
    advance()
    race = compare_latency(theirs, ours, batch=1)
    advance()
    return Race(
        accuracy_onnx=accuracy(_onnx_predictor(ours), task),
        mib_onnx=ours.stat().st_size / 2**20,
        mib_float_onnx=theirs.stat().st_size / 2**20,
        latency_float=race.a_ms.median,
        latency_ours=race.b_ms.median,
        ratio=race.ratio.median,
        ratio_q1=race.ratio.q1,
        ratio_q3=race.ratio.q3,
    )


def export_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """The float model as torch exports it."""
    from diffq_fx.export.onnx.tracing import quiet

    two = torch.cat([example, example])  # a batch of one would be taken for a constant
    shapes = ({0: torch.export.Dim("batch")},)
    with quiet():
        torch.onnx.export(model, (two,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def _onnx_predictor(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    from diffq_fx.export import session_options

    session = onnxruntime.InferenceSession(path, session_options(path, exact=True), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(inputs: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: inputs.numpy()})[0]))

    return predict


def _table(results: list[DemoResult]) -> Table:
    table = Table(title="float against compressed (sizes in MiB, batch 1)")
    table.add_column("")
    for result in results:
        table.add_column(result.task, justify="right")

    def row(title: str, show: Callable[[DemoResult], str]) -> None:
        table.add_row(title, *(show(result) for result in results))

    row("accuracy, float", lambda r: f"{r.accuracy_float:.2f} %")
    row("accuracy, prepared (eval)", lambda r: f"{r.accuracy_prepared:.2f} %")
    row("accuracy, converted", lambda r: f"{r.accuracy_converted:.2f} %")
    row("accuracy, ONNX (exact)", lambda r: f"{r.race.accuracy_onnx:.2f} %")
    row("bits per weight, scales included", lambda r: f"{r.average_bits:.2f}")
    table.add_section()
    row("size, float ONNX", lambda r: f"{r.race.mib_float_onnx:.3f}")
    row("size, our ONNX", lambda r: f"{r.race.mib_onnx:.3f}  ({r.race.mib_float_onnx / r.race.mib_onnx:.1f}x smaller)")
    row("size, bit-packed", lambda r: f"{r.mib_bit_packed:.3f}")
    table.add_section()
    row("latency, float ONNX", lambda r: f"{r.race.latency_float:.3f} ms")
    row("latency, our ONNX", lambda r: f"{r.race.latency_ours:.3f} ms")
    row("float / ours", lambda r: f"{r.race.ratio:.2f} [{r.race.ratio_q1:.2f}, {r.race.ratio_q3:.2f}]")
    return table
