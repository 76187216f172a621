"""Training a decoder of SmolLM2-135M's shape: tokens a second and peak memory of a step beside float.

    python -m benchmarks.language_training                  # one thread of a CPU, float32; twelve minutes
    python -m benchmarks.language_training --device cuda    # autocast in bfloat16
    python -m benchmarks.language_training --quick          # only to see that it runs; nothing is written

All systems run in turns in one process and train the same weights, which are random. Their peak of memory is that of three steps in a
process of its own: on a CPU the growth of the resident set, on a GPU what torch has allocated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks._result import markdown_table, write_result
from benchmarks._train_systems import Step, interleaved, ratio
from benchmarks.export_time import SHAPE, resident
from diffq_fx import DiffQConfig, freeze_bits, prepare_diffq, recompute_weights

SYSTEMS = (
    "float",
    "noise",
    "rounding",
    "noise, recompute_weights",
    "rounding, recompute_weights",
    "float, checkpointing",
    "noise, checkpointing",
    "noise, checkpointing, recompute_weights",
    "float, LoRA",
    "noise, LoRA",
)
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Systems:
    """Models that share the weights of one float model, but for those with adapters, whose base is frozen."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        from transformers import LlamaConfig

        shape = {**SHAPE, "num_hidden_layers": 30, "vocab_size": 49152}
        if quick:
            shape |= {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1000}
        self.config, self.device = LlamaConfig(use_cache=False, **shape), device
        batch, length = (1, 128) if device.type == "cpu" else (16, 512)
        self.ids = torch.randint(self.config.vocab_size, (batch, 16 if quick else length), device=device)
        self.made: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}

    def model(self, kind: str) -> nn.Module:
        """One of "float", "noise", "rounding", "float, LoRA" and "noise, LoRA"."""
        if kind in self.made:
            return self.made[kind][0]
        phase, *adapted = kind.split(", ")
        if phase != "float":
            model = prepare_diffq(self.model(", ".join(("float", *adapted))), {"input_ids": self.ids[:1, :16]}, DiffQConfig(target_bits=4))
        else:
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM(self.config).to(self.device)
            if adapted:
                from peft import LoraConfig, get_peft_model

                model = get_peft_model(model, LoraConfig(r=16, target_modules=ADAPTED, task_type="CAUSAL_LM"))
                model.enable_input_require_grads()
        if phase == "rounding":
            freeze_bits(model)
        trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        self.made[kind] = model, torch.optim.AdamW(trained, lr=1e-5, foreach=True)
        return model

    def step(self, name: str) -> Step:
        """A step of one of :data:`SYSTEMS`."""
        kind = name.replace(", checkpointing", "").replace(", recompute_weights", "")
        model, optimizer = self.model(kind), self.made[kind][1]

        def step() -> None:
            model.gradient_checkpointing_enable() if "checkpointing" in name else model.gradient_checkpointing_disable()
            optimizer.zero_grad()
            self._loss(model, "recompute_weights" in name).backward()
            optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return step

    def _loss(self, model: nn.Module, recomputes: bool) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"))
            if recomputes:
                stack.enter_context(recompute_weights())
            return model(input_ids=self.ids, labels=self.ids).loss


def peak(name: str, device: torch.device, quick: bool) -> int:
    """Bytes that three steps take in this process."""
    import peft  # noqa: F401  what is loaded does not count
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = resident("VmRSS")
    step = Systems(device, quick).step(name)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


def table(device: torch.device, quick: bool, rounds: int) -> str:
    """Time and memory of every system."""
    peaks = {}
    for name in SYSTEMS:
        command = [sys.executable, "-m", "benchmarks.language_training", "--device", device.type, "--one", name, *["--quick"] * quick]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, f"{peaks[name] / 2**30:.2f} GiB", flush=True)
    systems = Systems(device, quick)
    seconds = interleaved({name: systems.step(name) for name in SYSTEMS}, rounds)
    rows = []
    for name, own in seconds.items():
        phase, *rest = name.split(", ")
        base = ", ".join(["float", *(each for each in rest if each != "recompute_weights")])
        median = statistics.median(own)
        row = [name, f"{median:.3f}", f"{systems.ids.numel() / median:.1f}", ratio(own, seconds["float"])]
        row.append("" if phase == "float" else ratio(own, seconds[base]))
        rows.append([*row, f"{peaks[name] / 2**30:.2f}", f"{peaks[name] / peaks['float']:.2f}"])
    header = ("model", "step, s", "tokens a second", "over float", "over float of its kind", "peak, GiB", "peak over float")
    batch, length = systems.ids.shape
    return f"{rounds} rounds of {batch} x {length} tokens, AdamW; LoRA of rank 16 in all layers.\n\n{markdown_table(header, rows)}"


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if asked.one:
        print(peak(asked.one, device, asked.quick))
        return
    body = table(device, asked.quick, asked.rounds)
    if asked.quick:
        print(body)
        return
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of a CPU"
    name = "language_training" + ("_gpu" if device.type == "cuda" else "")
    path = write_result(name, f"Training a decoder of SmolLM2-135M's shape on {on}", body, ("torch", "transformers", "peft"))
    print(path.read_text())


if __name__ == "__main__":
    main()
