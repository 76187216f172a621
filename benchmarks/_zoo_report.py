"""The table of the zoo: what became of each architecture, and what stopped those that are not whole."""

import statistics
from collections import Counter
from typing import Any

from benchmarks._result import markdown_table, write_result
from benchmarks.zoo_models.steps import TOLERANCE

OUTCOMES = ("whole", "all but ONNX", "without ONNX", "refused", "failed", "float fails")
MOST_FORWARDS, MOST_TORCH, SLOW = 20, 5, 0.005
HEADER = ("model", "library", "family", "weights", "scope", "outcome", "prepare, forwards", "export / torch.onnx", "peak MiB")
PACKAGES = """torch onnxruntime transformers timm torchvision pytorchcv diffusers torch-geometric peft monai torchaudio speechbrain asteroid
vit-pytorch x-transformers segmentation-models-pytorch denoising-diffusion-pytorch conformer encodec""".split()


def write_report(lines: list[dict[str, Any]]) -> None:
    """Write the table of everything that was run."""
    ran = sorted((line for line in lines if line["outcome"] != "float fails"), key=lambda line: (line["family"], line["model"]))
    counts, families = Counter(line["outcome"] for line in ran), Counter(line["family"] for line in ran)
    prepares, exports = ([ratio for line in ran if (ratio := _ratios(line)[number]) is not None] for number in (0, 1))
    body = [
        f"{len(ran)} architectures of {len({line['library'] for line in ran})} libraries: "
        + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
        + ".",
        "Families: " + ", ".join(f"{name} {count}" for name, count in families.items()) + ".",
        _of_all_steps(ran),
        f"Prepare in forwards (train mode, batch of 2, mean of the forwards before and after it): {_spread(prepares, MOST_FORWARDS)}. "
        + _prepare_beside_torch(ran),
        f"export_onnx (with its check in onnxruntime) over torch.onnx's export of the float model: {_spread(exports, MOST_TORCH)}.",
        *["Without ONNX: all steps before the export were run, and were right; the export was not run yet."] * bool(counts["without ONNX"]),
        "Processor time on a machine with other load; peak MiB is the largest of all steps, above the memory before the step.",
        markdown_table(HEADER, [_row(line) for line in ran]),
        "## What is not whole",
        "Known before a training: check_onnx says the same of the float model. Torch: what torch.onnx does with the float model.",
        markdown_table(
            ("model", "outcome", "step", "known before a training", "message", "torch"),
            [_message(line) for line in ran if "message" in line],
        ),
    ]
    left = [f"{line['model']} ({line['message'].splitlines()[0][:120]})" for line in lines if line["outcome"] == "float fails"]
    if left:
        body.append("Not in the table, since the float model itself does not build, run or train here: " + "; ".join(left) + ".")
    print(write_result("zoo", "Other people's architectures", "\n\n".join(body), PACKAGES))


def write_full_size(lines: list[dict[str, Any]]) -> None:
    """Write what prepare takes on models of their libraries' default size."""
    ratios = [ratio for line in lines if (ratio := _ratios(line)[0]) is not None]
    header = ("model", "library", "parameters, M", "weights", "scope", "forward, ms", "prepare, forwards", "peak MiB", "what went wrong")
    body = (
        f"Prepare in forwards (train mode, one sample, mean of the forwards before and after it): {_spread(ratios, MOST_FORWARDS)}.\n\n"
        "Processor time, one thread; peak MiB is that of prepare, above the memory before it.\n\n"
    )
    print(
        write_result("zoo_full_size", "Prepare on models of default size", body + markdown_table(header, map(_large_row, lines)), PACKAGES)
    )


def _large_row(line: dict[str, Any]) -> tuple[Any, ...]:
    millions, forward = line.get("parameters", 0) / 1e6, line.get("forward_seconds", 0.0) * 1000
    named = (line["name"], line["library"], f"{millions:.1f}", line.get("weights", ""), line.get("scope", ""), f"{forward:.0f}")
    return (
        *named,
        _text(_ratios(line)[0]),
        f"{line['peak_mib'].get('prepare', 0.0):.0f}",
        " ".join(line.get("message", "").split())[-200:],
    )


def _row(line: dict[str, Any]) -> tuple[Any, ...]:
    named = (line.get(name, "") for name in ("name", "library", "family", "weights", "scope", "outcome"))
    return (*named, *map(_text, _ratios(line)), f"{max(line['peak_mib'].values(), default=0.0):.0f}")


def _message(line: dict[str, Any]) -> tuple[str, ...]:
    known = "yes" if line["outcome"] == "refused" else {True: "yes", False: "no", None: ""}[line.get("known_before_training")]
    texts = (" ".join(text.split()).replace("|", "\\|") for text in (line["message"], _of_torch(line)))
    return (line["model"], line["outcome"], line["step"], known, *texts)


def _ratios(line: dict[str, Any]) -> tuple[float | None, float | None]:
    """Prepare in forwards, and our export beside torch.onnx's own."""
    seconds = line["seconds"]
    prepare = seconds["prepare"] / line["forward_seconds"] if "prepare" in seconds and "forward_seconds" in line else None
    return prepare, seconds["onnx"] / seconds["torch.onnx"] if {"onnx", "torch.onnx"} <= seconds.keys() else None


def _spread(values: list[float], most: float) -> str:
    return (
        f"median {statistics.median(values):.1f}, from {min(values):.1f} to {max(values):.1f}; "
        f"{sum(value <= most for value in values)} of {len(values)} are within {most}"
    )


def _text(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _of_torch(line: dict[str, Any]) -> str:
    """What torch.onnx does with the float model, if it was asked."""
    if "torch_onnx_failure" in line:
        return f"refuses the float model too: {line['torch_onnx_failure']}"
    if line.get("torch_onnx_fixes_batch"):
        return "fixes the batch of the float model too"
    difference = line.get("torch_onnx_difference", 0.0)
    if isinstance(difference, str):
        return f"writes a file that does not run at another batch: {difference}"
    return "" if difference <= TOLERANCE else f"writes a wrong file: at another batch it differs by {difference:.1%} of the largest output"


def _of_all_steps(ran: list[dict[str, Any]]) -> str:
    """Counts of those that were taken through every step; what torch refuses in float too is counted apart."""
    tried = [line for line in ran if line["outcome"] != "without ONNX"]
    whole = sum(line["outcome"] == "whole" for line in tried)
    of_torch = sum(line["outcome"] == "all but ONNX" and bool(_of_torch(line)) for line in tried)
    told = sum(line["outcome"] == "refused" or bool(line.get("known_before_training")) for line in tried)
    return (
        f"Of {len(tried)} that were taken through every step {whole} are whole. {of_torch} more are whole but for ONNX, where torch.onnx "
        "refuses the float model too, fixes its batch or writes a file that is wrong at another; "
        f"without these {whole / (len(tried) - of_torch):.1%} are whole. "
        f"Of the {len(tried) - whole} that are not whole {told} were refused with the same words before a training."
    )


def _prepare_beside_torch(ran: list[dict[str, Any]]) -> str:
    """What a fixed cost of prepare does on nets whose forward takes milliseconds, and what torch's own traces take."""
    timed = [line for line in ran if _ratios(line)[0] is not None]
    slow = [_ratios(line)[0] for line in timed if line["forward_seconds"] > SLOW]
    parts = [f"Of the {len(slow)} whose forward takes more than {SLOW * 1000:.0f} ms {sum(r <= MOST_FORWARDS for r in slow)} are within."]
    for name in ("torch.fx", "torch.export"):
        own = [line for line in timed if name in line["seconds"] and not (name == "torch.export" and "torch_onnx_failure" in line)]
        if own:
            theirs = statistics.median(line["seconds"][name] / line["forward_seconds"] for line in own)
            ours = statistics.median(line["seconds"]["prepare"] / line["forward_seconds"] for line in own)
            parts.append(f"{name} alone traces {len(own)} of them, in {theirs:.1f} forwards (median); prepare takes {ours:.1f} there.")
    return " ".join(parts)
