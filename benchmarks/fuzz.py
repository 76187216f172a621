"""Files from strangers, fuzzed with coverage guidance (atheris): packed files, and ONNX files with their metadata.

An input is a file: a sound one, taken apart, changed where its structure has values, and put together with sizes and checksums that
fit; libFuzzer keeps those that reach new code. Reading it (load, inspect, print) must end in an answer or a ``DiffQError``, within
seconds, in at most twice the memory that the sound file takes which takes most (or 4 MiB), and print no control characters. What
else happens is named in the result, and its file is kept.

    python -m venv .fuzz && .fuzz/bin/pip install -c constraints.txt -e . atheris
    nice .fuzz/bin/python -m benchmarks.fuzz --inputs 100000
"""

import argparse
import collections
import ctypes
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import atheris
import torch
from rich.console import Console

from benchmarks._damage import change_value, damage, forge_body, forge_header, forge_section
from benchmarks._result import markdown_table, write_result

with atheris.instrument_imports(include=["diffq_fx.export", "diffq_fx.storage", "diffq_fx.cli", "diffq_fx.file_kinds"]):
    from diffq_fx.cli.inspect import inspect
    from diffq_fx.errors import DiffQError
    from diffq_fx.export import export_onnx, load_packed, save_packed, session_options
    from diffq_fx.export.onnx import inspection  # noqa: F401  imported late by the command
    from diffq_fx.export.packed import packed_report  # noqa: F401

from diffq_fx import DiffQConfig, convert, convert_diffq, prepare, prepare_diffq
from diffq_fx.methods import STE, ProductQuantization

SLOWEST_S, LEAST_KIB = 10.0, 4096
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
TEXTS = [
    "",
    "a",
    "\x1b[2J",
    "[/]",
    "..",
    "/etc/hostname",
    "a\0b",
    "9" * 5000,
    "-1",
    "1e999",
    "[" * 3000,
    '{"a": {}}',
    "Infinity",
    "NaN",
    "\ud800",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 16, 99, 255, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63)]
"""What a field of an ONNX file may say."""


def packed_seeds(folder: Path) -> None:
    """Sound packed files of all kinds, from 3 to 60 KB."""
    for path in Path(__file__).parents[1].glob("tests/packed/stored/*.safetensors"):
        (folder / path.name).write_bytes(path.read_bytes())
    models = {"image": torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 40))}
    models["row"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 512), torch.nn.Linear(512, 64))
    for name, model in models.items():
        prepared = prepare_diffq(model, torch.randn(2, 3, 8, 8), DiffQConfig(group_size=8 if name == "row" else "channel"))
        for quantizer in prepared.compression.quantizers:
            quantizer.logits.data.normal_()
        converted = convert_diffq(prepared)
        for compression in ("entropy", "bits"):
            save_packed(converted, folder / f"{name}-{compression}", compression)
    small = torch.nn.Linear(20, 12)
    save_packed(
        convert(prepare(small, torch.randn(2, 20), ProductQuantization(entries=5, block_size=2, entry_dtype="int8"))), folder / "codes"
    )


def onnx_seeds(folder: Path) -> None:
    """Exported files of several layouts, small enough that all of them can be changed."""
    image = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 8))
    words = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    numbers, ids = torch.randn(2, 3, 8, 8), torch.randint(30, (2, 5))
    for name, model, example, method, options in (
        ("image", image, numbers, STE(bits=3), {}),
        ("words", words, ids, STE(bits=4), {}),
        ("dynamic", words, ids, STE(bits=8), {"activations": "dynamic"}),
        ("qdq", words, ids, STE(bits=2), {"layout": "qdq"}),
        ("codes", words, ids, ProductQuantization(entries=5, block_size=2, entry_dtype="int8"), {}),
    ):
        export_onnx(convert(prepare(model, example, method)), example, folder / f"{name}.onnx", **options)


def forge_packed(data: bytes, size: int, seed: int) -> bytes:
    """Another packed file; one that cannot be taken apart any more is changed byte by byte."""
    draw = random.Random(seed)
    try:
        way = draw.random()
        if way < 0.03:
            return damage(data, draw)
        if way < 0.35:
            return forge_body(data, draw)
        if way < 0.65:
            return forge_section(data, draw, lambda part: atheris.Mutate(part, len(part) + 64))
        return forge_header(data, draw)
    except Exception:  # noqa: BLE001  what is no packed file any more is nobody's fault
        return atheris.Mutate(data, size)


def forge_onnx(data: bytes, size: int, seed: int) -> bytes:
    """Another ONNX file."""
    import onnx

    draw = random.Random(seed)
    try:
        model = onnx.load_from_string(data)
        for _ in range(draw.choice((1, 1, 2, 4))):
            if draw.random() < 0.4 and model.metadata_props:
                _change_entry(draw.choice(model.metadata_props), draw)
            else:
                _change_message(model, draw)
        return model.SerializeToString()
    except Exception:  # noqa: BLE001  as above
        return atheris.Mutate(data, size)


def _change_entry(entry, draw: random.Random) -> None:
    try:
        value = json.loads(entry.value)
    except ValueError:
        value = None
    if isinstance(value, dict) and draw.random() < 0.8:
        change_value(value, draw)
        entry.value = json.dumps(value)
    elif draw.random() < 0.7:
        entry.value = draw.choice(TEXTS)
    else:
        entry.key = draw.choice(["diffq_fx.schema", "diffq_fx.weights", "diffq_fx.sizes", "diffq_fx.session.x", *TEXTS])


def _change_message(message, draw: random.Random) -> None:
    """Change one field of a message, or of one inside it."""
    present = [field for field, _ in message.ListFields()]
    fields = message.DESCRIPTOR.fields if draw.random() < 0.1 or not present else present
    field = draw.choice(list(fields))
    value = getattr(message, field.name)
    repeated = not isinstance(value, (int, float, str, bytes)) and hasattr(value, "__len__")
    if field.message_type:
        if repeated and len(value) and draw.random() < 0.15:
            value.add().CopyFrom(draw.choice(value))
        elif repeated and len(value) and draw.random() < 0.15:
            del value[draw.randrange(len(value))]
        else:
            _change_message((draw.choice(value) if len(value) else value.add()) if repeated else value, draw)
        return
    kinds = {field.CPPTYPE_STRING: TEXTS, field.CPPTYPE_FLOAT: [0.0, -1.0, float("nan"), float("inf")]}
    new = draw.choice(kinds.get(field.cpp_type, NUMBERS))
    if field.type == field.TYPE_BYTES:
        new = atheris.Mutate(bytes(value) if not repeated else b"abcd", 4096)
    if not repeated:
        setattr(message, field.name, new)
    elif len(value) and draw.random() < 0.7:
        value[draw.randrange(len(value))] = new
    else:
        value.append(new)


def read_packed(path: Path, whole: bool) -> str:
    """Read a packed file, with ``whole`` in every way; what is printed of it."""
    load_packed(path)
    return _shown(path, whole) if whole else ""  # to count all codes takes longer than to decode them


def read_onnx(path: Path, whole: bool) -> str:
    """Read an ONNX file without running it; what is printed of it."""
    shown = _shown(path, whole)
    session_options(path)
    return shown


def _shown(path: Path, whole: bool) -> str:
    answer, text = inspect.__wrapped__(path, everything=True), io.StringIO()
    json.dumps(answer.data)
    if not whole:  # what rich makes of the cells takes longer than all the rest
        return "\n".join(cell.plain for table in answer.shown for column in table.columns for cell in (table.title, *column.cells))
    for table in answer.shown:
        Console(file=text, width=160).print(table, markup=False)
    return text.getvalue()


TARGETS = {"packed": (packed_seeds, forge_packed, read_packed), "onnx": (onnx_seeds, forge_onnx, read_onnx)}


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Memory that is given back goes to the system: what one input left behind would hide what the next one takes."""
KNOWN_KIB = 16384
PER_PROCESS, COUNTED_EVERY = 10_000, 100
"""Instrumented code keeps some 0.1 MiB of every input; the same code without atheris reads the same files in memory that does not grow."""


def _kib(field: str) -> int:
    """Memory of this process: VmRSS, what it has, or VmHWM, the most since that was last cleared."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Observer:
    """Reads one file after the other and keeps count; everything that is not meant is kept with its file."""

    def __init__(self, target: str, folder: Path, seeds: Path) -> None:
        self.read, self.folder, self.path = TARGETS[target][2], folder, Path(tempfile.mkdtemp(dir=folder)) / "file"
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest, self.most_kib, self.honest_kib = 0.0, 0, 0
        for turn in range(2):  # the first time something is imported or cached
            for seed in sorted(seeds.iterdir()):
                _, taken = self._observe(seed.read_bytes(), whole=True)
                self.honest_kib = max(self.honest_kib, taken) if turn else 0
        read, self.read = self.read, lambda path, whole: str(len(b"1" * (KNOWN_KIB << 10)))
        for _ in range(2):
            _, taken = self._observe(b"", whole=True)
            if not 0.9 * KNOWN_KIB < taken < 1.1 * KNOWN_KIB:
                raise SystemExit(f"{KNOWN_KIB} KiB that were taken measure as {taken}")
        self.read = read
        self.counts.clear()
        self.write()

    def __call__(self, data: bytes) -> None:
        seconds, taken = self._observe(data, whole=self.counts.total() % 8 == 0)
        self.slowest, self.most_kib = max(self.slowest, seconds), max(self.most_kib, taken)
        if seconds > SLOWEST_S:
            self._keep("slow", f"{seconds:.1f} s", data)
        if taken > max(2 * self.honest_kib, LEAST_KIB):
            self._keep("memory", f"{taken} KiB", data)
        if not self.counts.total() % COUNTED_EVERY:
            self.write()

    def write(self) -> None:
        facts = {
            "counts": self.counts,
            "resident_kib": _kib("VmRSS"),
            "slowest": self.slowest,
            "most_kib": self.most_kib,
            "honest_kib": self.honest_kib,
        }
        (self.folder / "counts.json").write_text(json.dumps(facts))

    def _observe(self, data: bytes, whole: bool) -> tuple[float, int]:
        """Seconds, and KiB by which the memory was larger meanwhile than before."""
        self.path.write_bytes(data)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _kib("VmHWM"), time.perf_counter()
        try:
            if found := CONTROLS.search(self.read(self.path, whole)):
                self._keep("control", repr(found[0]), data)
            self.counts["read"] += 1
        except (DiffQError, FileNotFoundError) as error:
            self.counts["refused"] += 1
            if found := CONTROLS.search(str(error)):
                self._keep("control", "in a message", data)
        except Exception as error:  # noqa: BLE001  this is what is looked for
            self.counts["crashed"] += 1
            last = [frame for frame in traceback.extract_tb(error.__traceback__) if "diffq_fx" in frame.filename][-1]
            self._keep("crash", f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:80]}", data)
        return time.perf_counter() - start, _kib("VmHWM") - before

    def _keep(self, kind: str, what: str, data: bytes) -> None:
        self.counts[kind] += 1
        place = self.folder / "findings" / re.sub(r"\W+", "_", f"{kind}_{what.partition(': ')[0]}")[:80]
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
            with (self.folder / "findings.txt").open("a") as file:
                file.write(f"{kind}: {what}: {place.name}\n")


def fuzz_here(target: str, folder: Path, runs: int) -> None:
    """Fuzz in this process, which does not return."""
    torch.set_num_threads(1)
    seeds = folder / "seeds"
    observer = Observer(target, folder, seeds)
    largest = max(seed.stat().st_size for seed in seeds.iterdir())
    arguments = [
        sys.argv[0],
        str(folder / "corpus"),
        str(seeds),
        f"-runs={runs}",
        f"-max_len={2 * largest}",
        "-timeout=60",
        "-rss_limit_mb=4096",
    ]

    sound = [seed.read_bytes() for seed in sorted(seeds.iterdir())]

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        data = sound[seed // 10 % len(sound)] if seed % 10 < 4 else data  # what is broken stays so
        forged = TARGETS[target][1](data, size, seed)
        return forged if len(forged) <= size else data[:size]

    atheris.Setup([*arguments, f"-artifact_prefix={folder}/died-", "-verbosity=0"], observer, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz(target: str, folder: Path, inputs: int) -> list[object]:
    """Fuzz in processes of their own until so many inputs were read; a row of the table."""
    for name in ("seeds", "corpus"):
        (folder / name).mkdir(parents=True)
    with warnings.catch_warnings(action="ignore"):
        TARGETS[target][0](folder / "seeds")
    done, died, sums, facts = 0, 0, collections.Counter(), {"slowest": 0.0, "most_kib": 0, "honest_kib": 0, "resident_kib": 0}
    while done < inputs:
        left = inputs - done
        runs = max(min(left, PER_PROCESS), COUNTED_EVERY)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--child", target, str(folder), str(runs)]
        code = subprocess.run(command, check=False, env=os.environ | ALLOCATOR).returncode
        found = json.loads((folder / "counts.json").read_text())
        died += code != 0
        sums.update(found["counts"])
        facts = {key: max(facts[key], found[key]) for key in facts}
        done = sums["read"] + sums["refused"] + sums["crashed"]
    kept = len(list((folder / "corpus").iterdir()))
    memory = f"{facts['most_kib'] / 1024:.1f} MiB, honest {facts['honest_kib'] / 1024:.1f}, resident {facts['resident_kib'] / 1024:.0f}"
    ends = [sums[key] for key in ("read", "refused", "crashed")]
    return [target, done, kept, *ends, died + sums["slow"], f"{facts['slowest']:.2f} s", memory, sums["memory"], sums["control"]]


def main() -> None:
    """Fuzz both, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each kind")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz-files"), help="where seeds, corpus and findings go")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    arguments = parser.parse_args()
    rows, findings = [], []
    for target in arguments.targets:
        folder = (
            Path(tempfile.mkdtemp(prefix=f"{target}-", dir=arguments.folder)) if arguments.folder.mkdir(exist_ok=True) is None else None
        )
        rows.append(fuzz(target, folder, arguments.inputs))
        if (folder / "findings.txt").exists():
            findings += [f"- {target}: {line}" for line in (folder / "findings.txt").read_text().splitlines()]
    header = (
        "files",
        "inputs",
        "kept for new code",
        "read",
        "refused",
        "other errors",
        "died or slow",
        "slowest",
        "most memory",
        "beyond twice",
        "control characters",
    )
    body = f"{markdown_table(header, rows)}\n\n" + ("\n".join(findings) or "No findings.")
    print(write_result("fuzz_" + "_".join(arguments.targets), "Files from strangers", body, ["atheris", "torch", "onnx"]).read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fuzz_here(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
