"""How time and peak memory of compress and compress_blocks grow with the layers and the width of a decoder.

Random decoders, each compressed untuned in a process of its own after a small one has loaded what is loaded once. Seconds are the
processor's; memory is the growth of the process at its peak, the float model not included, over the bytes of one layer in float32.
The C library keeps much of what small layers free: with MALLOC_MMAP_THRESHOLD_=65536 in the environment it goes back to the system, as
that of large layers does, and seconds are more.
"""

import argparse
import itertools
import multiprocessing
import time
import warnings

import torch
from torch import nn

from benchmarks._result import markdown_table, write_result
from benchmarks.frontier.post_training.matrices import measured
from diffq_fx import DiffQConfig, compress
from diffq_fx.post_training.block_by_block import compress_blocks

VOCABULARY, WINDOWS, TOKENS = 512, 16, 128
WAYS = ("compress", "compress_blocks")


def decoder(layers: int, width: int) -> nn.Module:
    """A random Llama of SmolLM2's proportions, without a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": 8, "num_key_value_heads": 8}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval()


def run(way: str, model: nn.Module, windows: list[dict[str, torch.Tensor]]) -> None:
    """Compress without tuning and without a limit of time that counts."""
    settings = {"steps": 0, "minutes": 1000.0, "progress": False}
    if way == "compress":
        compress(model, windows, DiffQConfig(), **settings)
    else:
        compress_blocks(model, windows, "model.layers.*", DiffQConfig(), **settings)


def point(way: str, layers: int, width: int) -> tuple[float, float, float, float]:
    """MiB of the model and of a layer, seconds, and the growth in MiB."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    windows = [{"input_ids": torch.randint(VOCABULARY, (1, TOKENS))} for _ in range(WINDOWS)]
    run(way, decoder(1, 64), windows[:2])
    model = decoder(layers, width)
    sizes = [sum(each.nbytes for each in module.parameters()) / 2**20 for module in (model, model.get_submodule("model.layers.0"))]
    with measured() as costs:
        began = time.process_time()
        run(way, model, windows)
        seconds = time.process_time() - began
    return sizes[0], sizes[1], seconds, costs["peak_mib"]


def main() -> None:
    """Measure all sizes in both ways, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    asked = parser.parse_args()
    rows = []
    for way, width, layers in itertools.product(asked.ways, asked.widths, asked.layers):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            model, layer, seconds, growth = pool.apply(point, (way, layers, width))
        numbers = (f"{model:.1f}", f"{layer:.2f}", f"{seconds:.1f}", f"{seconds / layers:.2f}", f"{growth:.0f}")
        rows.append((way, width, layers, *numbers, f"{growth / layer:.1f}", f"{growth / model:.1f}"))
        print(rows[-1], flush=True)
    header = ("", "width", "layers", "model MiB", "layer MiB", "seconds", "a layer", "growth MiB", "over a layer", "over the model")
    note = f"{WINDOWS} windows of {TOKENS} tokens, 4 bits, untuned, one thread."
    print(
        write_result(
            "compress_growth", "Compression of decoders: growth", f"{note}\n\n{markdown_table(header, rows)}", ["torch", "transformers"]
        )
    )


if __name__ == "__main__":
    main()
