"""Run with TRITON_INTERPRET=1: the kernels in Triton, on the CPU, beside torch's operations. Prints how far they are apart as JSON.

A process of its own, since Triton looks at the environment when a kernel is defined, and others compile the same kernels.
"""

import json
from unittest import mock

import torch

from benchmarks._noise_of_steps import add_noise
from diffq_fx import DiffQConfig
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import extension, gpu
from diffq_fx.weights import WeightSpec

ROWS = 3
SETTINGS = {
    "affine": {},
    "half": {"grid": "half"},
    "symmetric": {"grid": "symmetric", "noise": "gaussian"},
    "own ranges": {"grid": "float", "range_per": "group"},
    "unclipped": {"clip_ranges": False, "max_bits": 9},
}


def by(kernels, compute):
    """What ``compute`` gives with the kernels in Triton or with torch's operations, from the same seed."""
    with mock.patch.object(extension, "kernels", return_value=None), mock.patch.object(gpu, "DEVICES", ("cpu",) if kernels else ()):
        torch.manual_seed(1)
        return compute()


def apart(compute):
    """The largest difference of each result, as a part of the result's largest value."""
    found, expected = by(True, compute), by(False, compute)
    return [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(found, expected, strict=True)]


def with_gradients(compute, inputs, upstream):
    result = compute()
    return [result.detach(), *torch.autograd.grad(result, inputs, upstream.to(result.dtype))]


def steps_are_given(columns, group_size, dtype, gaussian):
    layout = GroupLayout.of(ROWS, columns, group_size)
    weight, step = torch.randn(ROWS, columns).to(dtype).requires_grad_(), torch.ones(layout.shape, requires_grad=True)
    upstream = torch.randint(-8, 8, (ROWS, columns)).float()

    def compute():
        return with_gradients(lambda: add_noise(weight, step, axis=0, block=layout.block, gaussian=gaussian), [weight, step], upstream)

    return apart(compute)


def quantizer_of(columns, group_size, settings):
    config = DiffQConfig(group_size=group_size, **settings)
    group, ranges, grid = config.layout
    weight = torch.randn(ROWS, columns, requires_grad=True)
    spec = WeightSpec(name="w", shape=(ROWS, columns), axis=0, group_size=group, range_size=ranges, grid=grid)
    return config.make_quantizer(spec, weight).train(), weight


def from_logits(columns, group_size, settings):
    quantizer, weight = quantizer_of(columns, group_size, settings)
    torch.nn.init.normal_(quantizer.logits, std=0.1)
    upstream = torch.randn(ROWS, columns)
    assert by(True, lambda: quantizer.noise.in_one_pass(weight, quantizer.logits))
    return apart(lambda: with_gradients(lambda: quantizer(weight), [weight, quantizer.logits], upstream))


def rounding(columns, group_size, settings):
    quantizer, weight = quantizer_of(columns, group_size, settings)
    quantizer.shared = mock.Mock(frozen=True)
    with torch.no_grad():
        quantizer.width.copy_(torch.randint(1, 9, quantizer.width.shape))
        quantizer.range_low.fill_(-1.3)
        quantizer.range_high.fill_(1.3 if settings.get("grid") == "symmetric" else 1.1)
        torch.nn.init.normal_(quantizer.clip, std=0.01)
    upstream = torch.randn(ROWS, columns)
    assert by(True, lambda: quantizer.round_in_range.in_one_pass(weight, quantizer.width))
    return apart(lambda: with_gradients(lambda: quantizer(weight), [weight, quantizer.clip], upstream))


def main():
    torch.manual_seed(0)
    noise = {
        f"{columns} by {size}, {str(dtype)[6:]}, {'gaussian' if gaussian else 'uniform'}": steps_are_given(columns, size, dtype, gaussian)
        for columns, size, dtype, gaussian in [
            (48, "channel", torch.float32, False),
            (48, "tensor", torch.float32, False),
            (48, 8, torch.float32, True),
            (48, 4, torch.float32, False),
            (48, 1, torch.bfloat16, False),
            (27, "channel", torch.float32, False),
            (27, 3, torch.float16, True),
            (2100, "channel", torch.float32, False),
        ]
    }
    grids = [(48, "channel"), (48, 8), (48, 12), (27, 3), (2100, "channel"), (2100, 4)]
    logits = {f"{c} by {g}, {name}": from_logits(c, g, s) for c, g in grids for name, s in SETTINGS.items() if c < 100 or name == "affine"}
    ranges = ({}, {"grid": "half"}, {"grid": "symmetric"}, {"range_per": "group"})
    rounded = {f"{c} by {g}, {s}": rounding(c, g, s) for c, g in grids for s in ranges if c < 100 or not s}
    print(json.dumps({"noise": noise, "logits": logits, "rounded": rounded}))  # noqa: T201


main()
