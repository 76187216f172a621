"""diffq as a black box against our paper preset: same bits, so the same noise step, the same rounded weights, the same size.

Both get the same weights and the same trained bits. The noise is held fixed by making every normal draw equal to one, which shows the
step of each group. Sizes may differ by what the coding of the widths takes: diffq codes them from its lowest width upwards, we from
each weight's own lowest, and diffq adds none of ours or we none of its per-tensor headers.
"""

import copy
from unittest import mock

import diffq
import torch
from torch import Tensor, nn

from benchmarks._result import markdown_table, write_result
from diffq_fx import DiffQConfig, model_size, prepare_diffq
from diffq_fx.budget.bit_state import GAIN

GROUP = 8


def make_model() -> nn.Module:
    """A small net whose rows are multiples of the group size, so that both divide the weights alike."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64)
    )


def prepared_by_diffq(model: nn.Module) -> tuple[nn.Module, "diffq.DiffQuantizer", dict[str, nn.Parameter]]:
    """The model under diffq, and its trainable bits by the name of the weight."""
    optimizer = torch.optim.Adam(model.parameters())  # it asks for an optimizer from before
    quantizer = diffq.DiffQuantizer(model, group_size=GROUP, min_size=0.01, min_bits=2, max_bits=15, init_bits=8)
    quantizer.setup_optimizer(optimizer)
    logits = {name.removesuffix("_diffq"): p for name, p in model.named_parameters() if name.endswith("_diffq")}
    return model, quantizer, logits


def seen_weights(model: nn.Module, names: list[str], example: Tensor) -> dict[str, Tensor]:
    """The weights that the layers computed with in one forward."""
    seen: dict[str, Tensor] = {}
    linear, conv2d = nn.functional.linear, torch.conv2d
    order = iter(names)

    def note(function):
        def call(x, weight, *args, **kwargs):
            seen[next(order)] = weight.detach().clone()
            return function(x, weight, *args, **kwargs)

        return call

    with mock.patch.object(nn.functional, "linear", note(linear)), mock.patch.object(nn.functional, "conv2d", note(conv2d)):
        model(example)
    return seen


def our_weights(model: nn.Module) -> dict[str, Tensor]:
    """The same for our prepared model: what its quantizers hand out."""
    return {q.spec.name: q(model.get_parameter(q.spec.name)).detach() for q in model.compression.quantizers}


def main() -> None:
    """Compare and write the result file."""
    float_model, example = make_model(), torch.randn(1, 16, 4, 4)
    theirs, quantizer, their_logits = prepared_by_diffq(copy.deepcopy(float_model))
    config = DiffQConfig.paper(penalty=None, group_size=GROUP)
    ours = prepare_diffq(float_model, example, config)
    names = [q.spec.name for q in ours.compression.quantizers]
    if sorted(names) != sorted(their_logits):
        raise SystemExit(f"not the same weights: {names} and {list(their_logits)}")

    generator = torch.Generator().manual_seed(1)
    for weight in ours.compression.quantizers:  # the same bits for both, spread over all widths that both can store
        logits = torch.randn(weight.logits.shape, generator=generator)
        weight.logits.data.copy_(logits / GAIN)
        their_logits[weight.spec.name].data.copy_(logits.reshape(their_logits[weight.spec.name].shape))

    ones = lambda like, *args, **kwargs: torch.ones_like(like)  # noqa: E731
    fixed = mock.patch("diffq_fx.kernels.eager._in_units", lambda noise, gaussian, into: (into.fill_(0.5), 1.0))
    with mock.patch.object(torch, "randn_like", ones), fixed, mock.patch("diffq_fx.kernels.extension.kernels", return_value=None):
        theirs.train(), ours.train()
        noisy = seen_weights(theirs, names, example), our_weights(ours)
    theirs.eval(), ours.eval()
    rounded = seen_weights(theirs, names, example), our_weights(ours)

    rows = []
    for weight in ours.compression.quantizers:
        name, raw = weight.spec.name, ours.get_parameter(weight.spec.name).detach()
        step_difference = (noisy[0][name] - noisy[1][name]).abs().max().item()
        spread = (raw.max() - raw.min()).item()
        apart = (rounded[0][name] - rounded[1][name]).abs() > 1e-6 * spread  # a tie that the two round to different sides
        rows.append((name, tuple(raw.shape), f"{step_difference / spread:.1e}", f"{int(apart.sum())} of {apart.numel()}"))
        if step_difference > 1e-6 * spread or apart.float().mean() > 1e-3:
            raise SystemExit(f"{name}: not at parity: {rows[-1]}")
    table = markdown_table(("weight", "shape", "noisy weight, largest difference / range", "rounded weights that differ"), rows)

    their_mib, our_mib = float(quantizer.true_model_size()), model_size(ours, exact=True)
    weights = sum(ours.get_parameter(name).numel() for name in names)
    coding = (their_mib - our_mib) * 8 * 2**20 / (weights / GROUP)
    sizes = markdown_table(
        ("", "MiB"),
        [
            ("diffq 0.2.4, true_model_size()", f"{their_mib:.5f}"),
            ("ours, model_size(exact=True)", f"{our_mib:.5f}"),
            ("difference, bits per group of 8", f"{coding:.3f}"),
        ],
    )
    path = write_result("diffq_parity", "Our paper preset and diffq at the same bits", f"{table}\n\n{sizes}", ["torch", "diffq"])
    print(path.read_text())


if __name__ == "__main__":
    main()
