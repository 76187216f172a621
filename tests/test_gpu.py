"""On a GPU itself: ``pytest -m gpu``. Without one, what needs none runs on the CPU, so that it still runs when there is one.

``test_triton_kernels.py`` and ``test_device_steps.py`` go without.
"""

import copy
import importlib
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks._noise_of_steps import add_noise
from diffq_fx import (
    DiffQConfig,
    Distillation,
    bits_report,
    compress,
    convert,
    convert_diffq,
    freeze_bits,
    prepare,
    prepare_diffq,
)
from diffq_fx.export import export_onnx, load_packed, save_packed
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import draws, extension, gpu, noise
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise

GPUS = [name for name in ("cuda", "mps") if getattr(torch, name, None) is not None and getattr(torch, name).is_available()]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:convert. the bits never moved")]
NVIDIA = pytest.mark.skipif("cuda" not in GPUS, reason="no GPU of torch's device cuda")


@pytest.fixture(params=GPUS or ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["triton", "torch"])
def body(request, device, monkeypatch):
    """The kernels in Triton, and torch's operations on the same device."""
    if request.param == "torch":
        monkeypatch.setattr(gpu, "DEVICES", ())
        if device.type == "cpu":
            monkeypatch.setattr(extension, "kernels", lambda: None)
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
        weight = quantizer(quantizer.weight)
        moved = quantizer.clip if final else quantizer.logits
        gradients = torch.autograd.grad(weight, [quantizer.weight, moved], torch.linspace(-1, 1, weight.numel()).view_as(weight).to(each))
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


METHODS = {
    "DiffQ": DiffQConfig(target_bits=4, training_steps=10),
    "groups of 8, symmetric": DiffQConfig(target_bits=4, training_steps=10, group_size=8, grid="symmetric"),
    "onnx_file": DiffQConfig(target_bits=4, training_steps=10, size_of="onnx_file"),
    "packed_file": DiffQConfig(target_bits=4, training_steps=10, size_of="packed_file"),
    "STE": STE(bits=4),
    "LSQ": LSQ(bits=4),
    "QuantNoise": QuantNoise(bits=4),
    "LC": LC(entries=4),
    "ProductQuantization": ProductQuantization(entries=8),
}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 8)
    )


IMAGES = torch.linspace(-3, 3, 8 * 3 * 12 * 12).sin().view(8, 3, 12, 12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_prepared_there_trained_saved_and_exported(method, device, tmp_path):
    if device.type == "cpu" and method not in (METHODS["DiffQ"], METHODS["LSQ"]):
        pytest.skip("no GPU; other tests have this method on a CPU")
    x = IMAGES.to(device)
    model = prepare(make_net().to(device), x[:2], method).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(12):
        step_of(model, optimizer, x)
    converted = convert(model)
    expected = model.eval()(x)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=0)
    save_packed(converted, tmp_path / "model.dfq")
    loaded = load_packed(make_net(), tmp_path / "model.dfq")
    torch.testing.assert_close(loaded(IMAGES), expected.cpu(), rtol=1e-3, atol=1e-4)
    if getattr(method, "grid", None) != "float":
        export_onnx(converted, x[:2], tmp_path / "model.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_in_mixed_precision(dtype, device):
    x = IMAGES.to(device)
    model = prepare_diffq(make_net().to(device), x[:2], DiffQConfig(target_bits=4, training_steps=20)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype is torch.float16)
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model.compression.frozen
    converted = convert_diffq(model)
    assert bits_report(converted).average_bits_in_all <= 4


def test_distilled_where_the_model_went_after_prepare(device):
    model = prepare_diffq(make_net(), IMAGES[:2], DiffQConfig(target_bits=4, training_steps=10))
    distill = Distillation(model)
    model.train().to(device)
    x, optimizer = IMAGES.to(device), torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        distill(x, model(x)).backward()
        optimizer.step()
    torch.testing.assert_close(distill.teacher(x).cpu(), make_net().eval()(IMAGES), rtol=1e-3, atol=1e-3)


def test_compressed_there(device):
    net = make_net().to(device)
    batches = [IMAGES.to(device).roll(k, -1) for k in range(8)]
    converted = compress(net, batches, DiffQConfig(target_bits=4), steps=20, progress=False)
    assert {each.device.type for each in converted.state_dict().values()} == {device.type}
    wanted, found = net.eval()(batches[0]), converted(batches[0])
    assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.01


@pytest.mark.parametrize("part", ["weights_table", "steps_table"])
def test_the_benchmark_runs(part, device):
    table = getattr(importlib.import_module("benchmarks.gpu"), part)(device, True, 1)
    assert {"noise", "rounding"} <= {cell.strip() for cell in table.split("|")}


@NVIDIA
@pytest.mark.parametrize("final", [False, True])
def test_compiled_by_inductor(final):
    x = IMAGES.cuda()
    model = prepare_diffq(make_net(), IMAGES[:2], DiffQConfig(target_bits=4)).train()
    if final:
        freeze_bits(model)
    model = model.cuda()
    compiled, grads = torch.compile(model, fullgraph=True), []
    for run in (model, compiled):
        torch.manual_seed(7)
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(bool(each.isfinite().all()) for each in grads[1])
    if final:  # a compiled graph draws other seeds
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()) + 1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        step_of(compiled, optimizer, x)


@NVIDIA
def test_sharded_over_one_gpu(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        model = prepare_diffq(make_net(), IMAGES[:2], DiffQConfig(target_bits=4, training_steps=10), scope="module").train().cuda()
        for layer in (model[4], model[6], model):
            fully_shard(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(12):
            step_of(model, optimizer, IMAGES.cuda())
        assert model.compression.frozen
    finally:
        distributed.destroy_process_group()
