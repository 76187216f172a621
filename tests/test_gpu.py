"""On a GPU itself: ``pytest -m gpu``. Skipped where there is none; ``test_triton_kernels.py`` and ``test_device_steps.py`` go without."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks._noise_of_steps import add_noise
from diffq_fx import DiffQConfig, convert_diffq, freeze_bits, prepare_diffq
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import draws, gpu, noise

GPUS = [name for name in ("cuda", "mps") if getattr(torch, name, None) is not None and getattr(torch, name).is_available()]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:convert. the bits never moved")]
NVIDIA = pytest.mark.skipif("cuda" not in GPUS, reason="no GPU of torch's device cuda")


@pytest.fixture(params=GPUS or [pytest.param("none", marks=pytest.mark.skip(reason="no GPU"))])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["triton", "torch"])
def body(request, device, monkeypatch):
    """The kernels in Triton, and torch's operations on the same device."""
    if request.param == "torch":
        monkeypatch.setattr(gpu, "DEVICES", ())
    elif device.type not in gpu.DEVICES or gpu.kernels() is None:
        pytest.skip("no Triton for this device")
    return request.param


def seeded(monkeypatch):
    monkeypatch.setattr(noise, "draw_seed", lambda device: torch.tensor([123456789], device=device))


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(
    ("columns", "group_size"), [(512, "channel"), (512, "tensor"), (512, 8), (512, 4), (512, 1), (27, "channel"), (5000, 50)]
)
def test_the_noise_of_a_cpu_bit_by_bit(columns, group_size, gaussian, device, body, monkeypatch):
    seeded(monkeypatch)
    layout, weight = GroupLayout.of(300, columns, group_size), torch.randn(300, columns)
    steps = torch.ones(layout.shape)
    expected = add_noise(weight, steps, axis=0, block=layout.block, gaussian=gaussian)
    found = add_noise(weight.to(device), steps.to(device), axis=0, block=layout.block, gaussian=gaussian)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("settings", [{}, {"group_size": 8}, {"grid": "symmetric", "noise": "gaussian"}, {"range_per": "tensor"}])
@pytest.mark.parametrize("final", [False, True])
def test_weights_and_gradients_of_a_cpu(settings, final, device, body, monkeypatch):
    torch.manual_seed(0)
    model = prepare_diffq(nn.Linear(512, 64), torch.zeros(1, 512), DiffQConfig(target_bits=4, **settings)).train()
    if final:
        freeze_bits(model)
    monkeypatch.setattr(noise, "draw_seed", lambda device: torch.tensor([5], device=device))
    found = []
    for each in (torch.device("cpu"), device):
        own, quantizer = copy.deepcopy(model).to(each), None
        (quantizer,) = own.compression.learned
        weight = quantizer(quantizer.source[0])
        moved = quantizer.clip if final else quantizer.logits
        gradients = torch.autograd.grad(
            weight, [quantizer.source[0], moved], torch.linspace(-1, 1, weight.numel()).view_as(weight).to(each)
        )
        found.append([weight.detach().cpu(), *(grad.cpu() for grad in gradients)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def step_of(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@NVIDIA
@pytest.mark.parametrize("final", [False, True])
def test_a_step_waits_for_nothing(final, body):
    model = prepare_diffq(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), torch.zeros(1, 64), DiffQConfig()).train()
    if final:
        freeze_bits(model)
    model, x = model.to("cuda"), torch.randn(16, 64, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    for _ in range(3):
        step_of(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_of(model, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NVIDIA
def test_a_cuda_graph_draws_anew_at_each_replay_and_a_seed_repeats_it(body):
    weight, steps = torch.zeros(64, 512, device="cuda"), torch.ones(64, 1, device="cuda")

    def draw():
        return add_noise(weight, steps, axis=0, block=512)

    draw()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy = draw()
    found = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        found.append(noisy.clone())
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert float(found[0].std()) == pytest.approx(12**-0.5, rel=0.02)


def test_trained_on_a_gpu_and_converted(device, body):
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    model = prepare_diffq(
        nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)), x[:1], DiffQConfig(target_bits=4, training_steps=20)
    )
    model = model.train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(25):
        step_of(model, optimizer, x.to(device))
    assert model.compression.frozen
    converted = convert_diffq(model)
    expected = model.eval()(x.to(device))
    torch.testing.assert_close(converted(x.to(device)), expected, rtol=0, atol=0)
    torch.testing.assert_close(converted.cpu()(x), expected.cpu(), rtol=1e-4, atol=1e-4)


@NVIDIA
def test_ranks_draw_differently():
    with mock.patch.object(torch.distributed, "is_initialized", return_value=True):
        seeds = []
        for rank in (0, 1):
            torch.cuda.manual_seed(3)
            with mock.patch.object(torch.distributed, "get_rank", return_value=rank):
                seeds.append(int(draws.draw_seed(torch.device("cuda"))))
    assert seeds[0] != seeds[1]
