"""A decoder of a Hugging Face folder as GGUF: what the file holds beside the model, and the tokens that llama.cpp generates from it.

Every weight is rounded once to the nearest level, without training: 4 bits, the embedding 8, a float16 scale for each 32 inputs.
python -m benchmarks.gguf_decoder FOLDER --out model.gguf. llama.cpp runs by node-llama-cpp (``npm install node-llama-cpp``, NODE_PATH).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._gguf import greedy, in_float32, run_llama, why_no_llama
from benchmarks._result import markdown_table, write_result
from diffq_fx import convert, prepare
from diffq_fx.export.gguf import export_gguf
from diffq_fx.export.gguf.architectures import architecture_of, row_order
from diffq_fx.methods import STE
from diffq_fx.parts import stored_weights

COMMAND = "python -m benchmarks.gguf_decoder FOLDER  # llama.cpp by node-llama-cpp"
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time there was",
    "The three primary colours are",
    "To bake bread you need",
    "In 1969 the first people",
    "A prime number is",
    "The opposite of hot is",
    "My favourite season is",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,",
    "The largest planet of the solar system",
    "import numpy as np\n",
    "He opened the door and",
    "The history of the bicycle",
    "1, 1, 2, 3, 5, 8,",
    "An apple a day",
    "Music is often said to",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("model.gguf"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    method = STE(bits=options.bits, group_size=32, grid="symmetric", scale_dtype="float16")
    ids = {"input_ids": torch.arange(8)[None]}
    converted = convert(prepare(model, ids, {"*embed_tokens*": replace(method, bits=8), "*": method}))
    result = export_gguf(converted, options.out, tokenizer=options.folder)
    read = AutoModelForCausalLM.from_pretrained(options.out.parent, gguf_file=options.out.name, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (read(**ids).logits - converted(**ids).logits).abs().max().item()
    wrong, weights = differing(converted, options.out), stored_weights(converted)
    rows = [
        ("file, bytes", f"{result.file_bytes:,}"),
        ("bits of a quantized weight, with scales", f"{result.bits_per_weight:.3f}"),
        ("weights with other values in the file than in the model", f"{len(wrong)} of {len(weights)}"),
        ("largest difference of the logits that transformers computes from the file", f"{difference:g}"),
        *(beside_torch(read, options) if not (why := why_no_llama()) else [("llama.cpp", why)]),
    ]
    title = f"{options.folder.resolve().name} at {options.bits} bits (embedding 8), rounded without training, as GGUF"
    table = markdown_table(("", "found"), rows)
    print(table, write_result("gguf_decoder", title, table, ("torch", "transformers", "gguf"), command=COMMAND), sep="\n")


def beside_torch(read, options):
    """What llama.cpp generates of the file, and of the same in float32, beside torch's greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    expected, total = greedy(read, prompts, options.tokens), len(TEXTS) * options.tokens
    followed = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, expected, strict=True)]
    for name, path in (("all tensors as float32", in_float32(options.out)), ("as written", options.out)):
        found = run_llama(path, prompts, options.tokens, followed, TEXTS)
        after = [tokens[-options.tokens :] for tokens in found["next"]]
        yield (
            f"llama.cpp, {name}: prompts with torch's {options.tokens} greedy tokens",
            f"{count_equal(found['generated'], expected)} of {len(TEXTS)}",
        )
        yield (
            f"llama.cpp, {name}: next tokens that are torch's, after torch's so far",
            f"{sum(map(count_equal, after, expected))} of {total}",
        )
    yield "texts that llama.cpp cuts as the tokenizer does", f"{count_equal(found['tokens'], prompts)} of {len(TEXTS)}"


def count_equal(found, expected):
    return sum(a == b for a, b in zip(found, expected, strict=True))


def differing(converted, path):
    """Names of the weights that the file does not have bit by bit."""
    config, tensors = converted.config, {each.name: each for each in gguf.GGUFReader(path).tensors}
    architecture = architecture_of(config)
    table = gguf.get_tensor_name_map(architecture.known, config.num_hidden_layers)
    wrong = []
    for _, stored in stored_weights(converted):
        name = table.get_name(stored.spec.name, (".weight",))
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        order = row_order(architecture, name, config, len(values))
        expected = stored().numpy() if order is None else stored().numpy()[order]
        if not np.array_equal(values, expected):
            wrong.append(stored.spec.name)
    return wrong


if __name__ == "__main__":
    main()
