"""What torch.compile costs on BERT-base's shape: CPU seconds of the first step, each in a fresh process without a cache."""

import json
import os
import resource
import subprocess
import sys
import tempfile

from benchmarks._result import markdown_table

LAYERS, QUICK_LAYERS = 12, 2
MODELS = ("float", "noise", "rounding")


def part_compile(quick: bool) -> str:
    """CPU seconds, of which a part goes to the C++ compiler, and how many calls the graph has."""
    layers = QUICK_LAYERS if quick else LAYERS
    found = {model: _in_a_process(model, layers) for model in MODELS}
    base = found["float"]["seconds"]
    rows = [
        [model, f"{each['seconds']:.0f}", f"{each['compiler']:.0f}", f"{each['seconds'] / base:.2f}", str(each["calls"])]
        for model, each in found.items()
    ]
    header = ("model", "CPU seconds", "of these the C++ compiler's", "over float", "calls in the graph")
    return f"BERT-base's shape with {layers} layers, 2 x 16 tokens, Inductor.\n\n" + markdown_table(header, rows)


def _in_a_process(model: str, layers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks._train_compile", model, str(layers)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(what: str, layers: int) -> dict[str, float]:
    import torch
    import transformers
    from torch._dynamo.utils import counters

    from diffq_fx import freeze_bits, prepare_diffq

    torch.manual_seed(0)
    ids = torch.randint(30_000, (2, 16))
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=layers))
    if what != "float":
        model = prepare_diffq(model, {"input_ids": ids})
    if what == "rounding":
        freeze_bits(model)
    before = _cpu_seconds()
    torch.compile(model.train())(input_ids=ids).logits.square().sum().backward()
    own, children = (after - start for after, start in zip(_cpu_seconds(), before, strict=True))
    return {"seconds": own + children, "compiler": children, "calls": counters["stats"]["calls_captured"]}


def _cpu_seconds() -> tuple[float, float]:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
