"""GGUF files read back: their values, the same file in float32, and greedy tokens of llama.cpp beside torch's."""

import json
import shutil
import subprocess
from pathlib import Path

import gguf
import torch

SCRIPT = Path(__file__).with_name("run_in_llama.js")


def values_of(path):
    """Tensors of a file by name, in float32."""
    return {each.name: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type)) for each in gguf.GGUFReader(path).tensors}


def in_float32(path):
    """The same file with all tensors in float32: llama.cpp then rounds no activations to 8 bits."""
    reader, target = gguf.GGUFReader(path), path.with_name(f"float32-{path.name}")
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, values in values_of(path).items():
        writer.add_tensor(name, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def why_no_llama():
    """What is missing of llama.cpp (``npm install node-llama-cpp``, and NODE_PATH if need be); empty if nothing is."""
    if (node := shutil.which("node")) is None:
        return "node is not installed"
    found = subprocess.run([node, "-e", "require.resolve('node-llama-cpp')"], cwd=SCRIPT.parent, capture_output=True)
    return "node-llama-cpp is not installed where node finds it (NODE_PATH)" if found.returncode else ""


def run_llama(path, prompts=(), count=1, followed=(), texts=()):
    """What llama.cpp makes of a file: "generated", greedy tokens after each prompt; "next", the likeliest one after each token that is
    followed; "tokens" of each text."""
    job = path.with_suffix(".json")
    job.write_text(json.dumps({"file": str(path), "prompts": prompts, "count": count, "followed": followed, "texts": texts}))
    ran = subprocess.run(["node", str(SCRIPT), str(job)], check=True, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


@torch.no_grad()
def greedy(model, prompts, count):
    """Greedy tokens after each prompt by torch."""
    generated = []
    for prompt in prompts:
        tokens, cache = list(prompt), None
        for _ in range(count):
            given = tokens if cache is None else tokens[-1:]
            output = model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
        generated.append(tokens[len(prompt) :])
    return generated
