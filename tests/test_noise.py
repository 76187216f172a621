"""Pseudo quantization noise: its distribution, its independence, its gradients."""

import math

import pytest
import torch
from scipy import stats

from benchmarks._noise_of_steps import add_noise
from diffq_fx import functional
from diffq_fx.errors import DiffQError
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import draws, extension, memory, release
from diffq_fx.kernels.bits import slope_of_step, step_of_logits
from diffq_fx.kernels.derivatives import first_alone

N = 200_000


pytestmark = pytest.mark.usefixtures("backend")


def noise_of(shape=(100, N // 100), gaussian=False, dtype=torch.float32):
    weight = torch.zeros(shape, dtype=dtype)
    return add_noise(weight, torch.ones(shape[0], 1), axis=0, block=shape[1], gaussian=gaussian)


@pytest.mark.parametrize(("gaussian", "std"), [(False, 1 / math.sqrt(12)), (True, 0.5)])
def test_mean_and_variance(gaussian, std):
    noise = noise_of(gaussian=gaussian).double()
    assert abs(noise.mean().item()) < 4 * std / math.sqrt(N)
    assert noise.std().item() == pytest.approx(std, rel=0.01)


def test_uniform_by_kolmogorov_smirnov():
    noise = noise_of().flatten()
    spread = noise + (torch.rand(noise.shape) - 0.5) / 128  # the resolution of 128 values, smeared out
    assert stats.kstest(spread.numpy(), "uniform", args=(-0.5, 1)).pvalue > 1e-3
    assert float(noise.abs().max()) < 0.5


def test_gaussian_by_kolmogorov_smirnov():
    noise = noise_of(gaussian=True).flatten().double() / 0.5
    share = torch.special.ndtr(noise * (1 - 1e-9))
    spread = share + (torch.rand(noise.shape, dtype=torch.float64) - 0.5) / 128  # the resolution of 128 quantiles, smeared out
    assert stats.kstest(spread.numpy(), "uniform").statistic < 0.01


@pytest.mark.parametrize("gaussian", [False, True])
def test_independent_between_weights_and_draws(gaussian):
    first, second = noise_of(gaussian=gaussian).flatten(), noise_of(gaussian=gaussian).flatten()
    bound = 5 / math.sqrt(N)
    assert not torch.equal(first, second)
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:-8], first[8:]), (first[: N // 2], first[N // 2 :])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < bound * 1.5


def test_ranks_seeded_alike_draw_differently(monkeypatch):
    draws = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, 2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(7)
        draws.append(noise_of().flatten())
    correlation = torch.corrcoef(torch.stack(draws))
    assert float((correlation - torch.eye(3)).abs().max()) < 8 / math.sqrt(N)


def test_a_seed_repeats_a_draw():
    torch.manual_seed(3)
    first = noise_of()
    torch.manual_seed(3)
    assert torch.equal(first, noise_of())


LAYOUTS = [("tensor", (4, 6), 0), ("channel", (4, 2), 0), (4, (4, 10), 0), (1, (3, 5), 0), ("channel", (4, 6, 3), 1), (5, (4, 6, 3), 1)]


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(("group_size", "shape", "axis"), LAYOUTS)
def test_gradients(group_size, shape, axis, gaussian):
    rows = shape[axis]
    layout = GroupLayout.of(rows, math.prod(shape) // rows, group_size)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    step = torch.rand(layout.shape, dtype=torch.float64).add(0.1).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)

    def loss(step):
        torch.manual_seed(11)
        return (add_noise(weight, step, axis=axis, block=layout.block, gaussian=gaussian) * upstream).sum()

    loss(step).backward()
    assert torch.equal(weight.grad, upstream)  # the identity
    epsilon = 1e-5
    for r in range(layout.shape[0]):
        for c in range(layout.shape[1]):
            shift = torch.zeros_like(step)
            shift[r, c] = epsilon
            with torch.no_grad():
                finite = (loss(step + shift) - loss(step - shift)) / (2 * epsilon)
            torch.testing.assert_close(step.grad[r, c], finite, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_dtypes_and_strides(dtype, contiguous):
    weight = torch.randn(6, 8, dtype=dtype)
    weight = weight if contiguous else weight.t().contiguous().t()
    weight.requires_grad_()
    noisy = add_noise(weight, torch.full((6, 1), 0.5), axis=0, block=8)
    noisy.sum().backward()
    assert noisy.dtype == dtype
    assert noisy.shape == weight.shape
    assert float((noisy - weight).abs().max()) <= 0.26
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_channel_along_any_axis_gets_its_own_step_and_the_noise_of_its_row(axis):
    shape = (4, 6, 8)
    step = torch.zeros(shape[axis], 1)
    step[1] = 1.0
    torch.manual_seed(5)
    noisy = add_noise(torch.zeros(shape), step, axis=axis, block=4 * 6 * 8 // shape[axis])
    torch.manual_seed(5)
    noise = draws.noise_bytes(draws.draw_seed(torch.device("cpu")), 0, noisy.numel()).view(shape[axis], -1) / 256
    torch.testing.assert_close(noisy.movedim(axis, 0).flatten(1), noise * step)


def test_some_weights_have_the_noise_that_they_have_among_all():
    seed = torch.tensor([7])
    every = draws.noise_bytes(seed, 0, 64)
    for first, count in ((0, 8), (3, 9), (8, 8), (9, 6), (17, 40)):
        assert torch.equal(draws.noise_bytes(seed, first, count), every[first : first + count])


def test_short_last_block_gets_its_own_step():
    step = torch.tensor([[0.0, 1.0]])
    noisy = add_noise(torch.zeros(1, 5), step, axis=0, block=4)
    assert noisy[0, :4].abs().max() == 0
    assert noisy[0, 4] != 0


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 700_000), 700_000),
        ((700, 1000), 1000),
        ((90_000, 8), 8),
        ((500, 1000), 8),
        ((500, 1001), 8),
        ((9, 5003), 3000),
        ((90, 3000), 1),
    ],
)
def test_every_weight_gets_its_own_noise_and_step_once(shape, block, gaussian):
    """Tiles, chunks, threads and short last blocks leave nothing out, and the backward knows the noise of the forward."""
    rows, columns = shape
    weight = torch.zeros(shape, requires_grad=True)
    layout = GroupLayout.of(rows, columns, block)
    step = torch.rand(layout.shape).add(0.5).requires_grad_()
    noisy = add_noise(weight, step, axis=0, block=layout.block, gaussian=gaussian)
    noise = (noisy / layout.expand(step)).detach()
    assert noise.abs().min() > 0
    assert noise.unique().numel() >= 128
    assert noise.std().item() == pytest.approx(0.5 if gaussian else 12**-0.5, rel=0.02)
    upstream = torch.randn(shape)
    noisy.backward(upstream)
    torch.testing.assert_close(step.grad, layout.sum(upstream * noise), rtol=1e-4, atol=2e-3)


def test_the_kernel_does_not_depend_on_the_threads(backend):
    threads, draws = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        draws.append(noise_of())
    torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "shapes", [((5, 4), (5, 1)), ((1, 1), (5, 1)), ((5, 1), (1, 1)), ((600, 500), (600, 1)), ((600, 500), (1, 1)), ((600, 500), (600, 500))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_of_logits_is_the_long_form(shapes, dtype):
    logits, bits = torch.randn(shapes[0], dtype=dtype, requires_grad=True), (2, 8, 3.0)
    span = torch.rand(shapes[1], dtype=dtype)
    short = step_of_logits(logits.detach(), span, bits)
    long = functional.step_size(torch.zeros_like(span), span, functional.bits_from_logits(logits, 2, 8, 3.0))
    torch.testing.assert_close(short, long)
    upstream = torch.randn_like(long)
    found = slope_of_step(upstream, logits.detach(), span, short, growth=None, bits=bits)
    (expected,) = torch.autograd.grad((long * upstream).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_memory_of_dead_noise_is_used_again_and_that_of_the_living_never(backend):
    if backend == "torch":
        return
    weight, step = torch.zeros(512, 1024), torch.ones(512, 1)
    first = add_noise(weight, step, axis=0, block=1024)
    view, copy_of_first, place = first[100:], first.clone(), first.data_ptr()
    second = add_noise(weight, step, axis=0, block=1024)
    assert second.data_ptr() != place
    del first
    third = add_noise(weight, step, axis=0, block=1024)  # a view keeps the memory of the first
    assert third.data_ptr() != place
    assert torch.equal(view, copy_of_first[100:])
    del view
    assert add_noise(weight, step, axis=0, block=1024).data_ptr() == place
    release()
    assert not memory._free


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("columns", [1000, 27, 300_000])
def test_c_and_torch_draw_the_same_noise(columns, gaussian, backend, monkeypatch):
    """Steps of one: every product is exact, so the sums are rounded alike."""
    if backend == "torch" or extension.kernels() is None:
        pytest.skip("compares both")
    weight, steps = torch.randn(7, columns), torch.ones(7, 1)
    draws = []
    for kernels in (extension.kernels(), None):
        monkeypatch.setattr(extension, "kernels", lambda kernels=kernels: kernels)
        torch.manual_seed(2)
        draws.append(add_noise(weight, steps, axis=0, block=columns, gaussian=gaussian))
    assert torch.equal(*draws)


def test_tables_that_inference_mode_has_made_serve_training():
    draws._kept_table.cache_clear()
    with torch.inference_mode():
        draws.gaussian_table(torch.device("cpu"))
    table = draws.gaussian_table(torch.device("cpu"))
    assert not table.is_inference()
    assert draws.gaussian_table(torch.device("cpu")) is table, "copied to a device once"


def test_closed_forms_have_a_first_derivative_alone():
    x = torch.ones(2, requires_grad=True)
    found = first_alone(torch.exp, x)
    assert torch.equal(found, torch.exp(x))
    with pytest.raises(DiffQError, match="second derivative through the bits or the range"):
        found.sum().backward()
    with torch.no_grad():
        assert torch.equal(first_alone(torch.exp, x), torch.exp(x))


def test_ranks_that_were_seeded_alike_draw_other_seeds(monkeypatch):
    found = []
    assert draws._rank() == 0
    for rank in range(40):
        monkeypatch.setattr(draws, "_rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        found.append(draws.draw_seed(torch.device("cpu")).item())
    step = 0x9E3779B97F4A7C15
    assert found == [(found[0] + rank * step % 2**63) % 2**63 for rank in range(40)]
    assert len(set(found)) == 40
