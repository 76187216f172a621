"""What training with noise costs on a GPU: the kernels beside a copy of the same memory, and whole steps beside plain ones.

    python -m benchmarks.gpu weights             # one weight; half a minute
    python -m benchmarks.gpu steps               # whole steps of a transformer; two minutes
    python -m benchmarks.gpu compiled            # the same by torch.compile; some minutes
    python -m benchmarks.gpu graphed             # the same captured as a CUDA graph, once the bits are final
    python -m benchmarks.gpu steps --device cpu --quick   # only to see that it runs

Torch's own operations run in turns with the kernels in Triton. Times are medians between two events of the device.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, freeze_bits, prepare_diffq
from diffq_fx.kernels import gpu

BODIES = {"Triton": gpu.DEVICES, "torch": ()}
STEP_COLUMNS = ("precision", "body", "bits", "phase", "step, ms", "over plain", "host, ms")
CONFIGS = {"per channel": {}, "in groups of 8": {"group_size": 8}}


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of single calls, the device's work included."""
    for _ in range(3):  # compiles, fills caches
        call()
    if device.type != "cuda":
        return host_milliseconds(call, device, rounds)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def weights_table(device: torch.device, quick: bool, rounds: int) -> str:
    """One weight: forward and backward of noise and of rounding, beside copying it twice."""
    rows = []
    for shape in [(64, 64)] if quick else [(64, 576), (1024, 1024), (4096, 4096), (50_000, 768)]:
        source = torch.randn(shape, device=device)
        target, grad = torch.empty_like(source), torch.randn(shape, device=device)
        copied = 2 * milliseconds(partial(target.copy_, source), device, rounds)
        for name, settings in CONFIGS.items():
            layer, example = nn.Linear(shape[1], shape[0], bias=False, device=device), torch.zeros(1, shape[1], device=device)
            noisy = prepare_diffq(layer, example, DiffQConfig(target_bits=None, **settings)).train()
            final = copy.deepcopy(noisy)
            freeze_bits(final)
            for phase, model in (("noise", noisy), ("rounding", final)):
                (quantizer,) = model.compression.learned
                weight = quantizer.weight
                asked = [weight, quantizer.logits if phase == "noise" else quantizer.clip]

                def step(
                    quantizer: nn.Module = quantizer, weight: Tensor = weight, asked: list[Tensor] = asked, grad: Tensor = grad
                ) -> None:
                    torch.autograd.grad(quantizer(weight), asked, grad)

                times = []
                for devices in BODIES.values():
                    with mock.patch.object(gpu, "DEVICES", devices):
                        times.append(milliseconds(step, device, rounds))
                print(shape, name, phase, *times, flush=True)
                rows.append([f"{shape[0]} x {shape[1]}", name, phase, *(f"{each:.3f}" for each in (copied, *times))])
    return markdown_table(("weight", "bits", "phase", "two copies, ms", *(f"{body}, ms" for body in BODIES)), rows)


def steps_table(device: torch.device, quick: bool, rounds: int) -> str:
    """Whole training steps of a transformer over those of the plain model."""
    models, x = transformers_of(device, quick)
    rows = []
    for precision, body in ((torch.float32, "Triton"), (torch.bfloat16, "Triton"), (torch.bfloat16, "torch")):
        with mock.patch.object(gpu, "DEVICES", BODIES[body]):
            rows += step_rows(models, x, precision, body, rounds)
    return markdown_table(STEP_COLUMNS, rows)


def compiled_table(device: torch.device, quick: bool, rounds: int) -> str:
    """The same, compiled by inductor."""
    models, x = transformers_of(device, quick)
    some = {key: models[key] for key in list(models)[:3]}
    rows = step_rows(some, x, torch.bfloat16, "compiled", rounds)
    return markdown_table(STEP_COLUMNS, rows)


def graphed_table(device: torch.device, quick: bool, rounds: int) -> str:
    """The plain model and the one with final bits, as they are and captured as CUDA graphs (torch.cuda.make_graphed_callables)."""
    models, x = transformers_of(device, quick)
    rows: list[list[str]] = []
    autocast = partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)
    for key in (("plain", ""), ("per channel", "rounding")):
        for graphed in (False, True):
            model = copy.deepcopy(models[key]).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
            run = model
            if graphed:
                with autocast():
                    run = torch.cuda.make_graphed_callables(model, (x,), allow_unused_input=True)

            def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad(set_to_none=False)
                with autocast():
                    loss = run(x).float().square().mean()
                loss.backward()
                optimizer.step()

            took = milliseconds(step, device, rounds)
            first = next((float(row[2]) for row in rows if row[0] == ("graph" if graphed else "eager")), took)
            rows.append(["graph" if graphed else "eager", " ".join(key).strip(), f"{took:.2f}", f"{took / first:.2f}"])
    return markdown_table(("run", "model", "step, ms", "over plain"), rows)


def transformers_of(device: torch.device, quick: bool) -> tuple[dict[tuple[str, str], nn.Module], Tensor]:
    """A plain encoder, the same with bits of each kind in each phase, and an input."""
    width, layers, tokens = (64, 2, 16) if quick else (1024, 12, 512)
    make = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(make, layers, enable_nested_tensor=False).to(device)
    x = torch.randn(8, tokens, width, device=device)
    models = {("plain", ""): plain}
    for name, config in CONFIGS.items():
        models[name, "noise"] = prepare_diffq(copy.deepcopy(plain), x[:1], DiffQConfig(target_bits=4, **config))
        models[name, "rounding"] = copy.deepcopy(models[name, "noise"])
        freeze_bits(models[name, "rounding"])
    return models, x


def step_rows(models: dict[tuple[str, str], nn.Module], x: Tensor, precision: torch.dtype, body: str, rounds: int) -> list[list[str]]:
    """Those of one precision, bfloat16 being autocast's, and one body of the kernels; host is the time until all is asked for."""
    rows, device = [], x.device
    for (name, phase), each in models.items():
        model = copy.deepcopy(each).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        run = torch.compile(model) if body == "compiled" else model

        def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
                loss = run(x).square().mean()
            loss.backward()
            optimizer.step()

        took, host = milliseconds(step, device, rounds), host_milliseconds(step, device, rounds)
        over = f"{took / float(rows[0][4]):.2f}" if rows else "1"
        rows.append([str(precision).removeprefix("torch."), body, name, phase, f"{took:.2f}", over, f"{host:.2f}"])
        print(*rows[-1], flush=True)
    return rows


def host_milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median time until a call returns, which begins with an idle device: what the device's work may hide."""
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


PARTS = {"weights": weights_table, "steps": steps_table, "compiled": compiled_table, "graphed": graphed_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    body = PARTS[asked.part](device, asked.quick, 2 if asked.quick else 30)
    print(body)
    if not asked.quick:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(write_result(f"gpu_{asked.part}", f"Training on {card}: {asked.part}", body, ("torch", "triton")))


if __name__ == "__main__":
    main()
