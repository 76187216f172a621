"""The check for changed values: every write to memory is seen, whatever made it."""

import pytest
import torch

from diffq_fx.kernels import checksum as module
from diffq_fx.kernels import extension
from diffq_fx.kernels.checksum import checksum


@pytest.fixture(params=[*extension.variants(), "torch"], autouse=True)
def kernels(request, monkeypatch):
    """Each variant of the kernels, and none."""
    monkeypatch.setenv("DIFFQ_FX_KERNELS", request.param)
    extension.kernels.cache_clear()
    yield request.param
    monkeypatch.undo()
    extension.kernels.cache_clear()


@pytest.mark.parametrize("size", [1, 3, 2047, 2048, 2049, 5000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_one_value_anywhere(size, dtype):
    torch.manual_seed(0)
    weight = torch.randint(-100, 100, (size,)).to(dtype)
    before, seen = checksum([weight]), set()
    for place in {0, size // 3, size - 1}:
        changed = weight.clone()
        changed.data[place] += 1
        seen.add(checksum([changed]))
    assert before == checksum([weight.clone()])
    assert before not in seen
    assert len(seen) == len({0, size // 3, size - 1})


def test_order_places_and_lengths():
    a, b = torch.zeros(4096), torch.ones(4096)
    twice = torch.cat([a, b, a, b])
    moved = torch.cat([b, a, a, b])
    numbers = [checksum(each) for each in ([a, b], [b, a], [a], [a[:-1]], [a, a], [twice], [moved], [a[:0]], [])]
    assert len(set(numbers)) >= len(numbers) - 1  # without kernels nothing is as much as an empty tensor
    assert checksum([b.view(64, 64).t()]) == checksum([b])


def test_any_number_of_threads():
    weight, threads = torch.randn(300_001), torch.get_num_threads()
    numbers = set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            numbers.add(checksum([weight]))
    finally:
        torch.set_num_threads(threads)
    assert len(numbers) == 1


def test_variants_agree(kernels, monkeypatch):
    if kernels == "torch":
        pytest.skip("another number")
    weight = torch.arange(10_001, dtype=torch.float32)
    first = checksum([weight])
    for other in extension.variants():
        monkeypatch.setenv("DIFFQ_FX_KERNELS", other)
        extension.kernels.cache_clear()
        assert checksum([weight]) == first


def test_memory_that_cannot_be_read():
    assert checksum([torch.zeros(2, device="meta")]) is None
    assert module.device_checksum([torch.zeros(2)]) == checksum([torch.zeros(2)])
