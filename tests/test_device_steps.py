"""What a training step asks of a device: operations and host copies for each weight, counted on tensors without memory.

Device "meta" stands for a GPU: whatever waits for the device or copies from it is an error there.
"""

import collections
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffq_fx import DiffQConfig, _compat, prepare_diffq
from diffq_fx.functional import precision
from diffq_fx.functional.precision import widest_float
from diffq_fx.kernels import draws, gpu, ranges
from diffq_fx.methods import diffq_settings
from diffq_fx.storage import integers

NO_WORK = set("view alias detach slice select expand unsqueeze squeeze t transpose unbind split promote_types _unsafe_view".split())
NO_WORK |= {"empty", "empty_like", "new_empty", "empty_strided", "as_strided", "permute"}  # memory of the caching allocator


class Counted(TorchDispatchMode):
    """Operations that start work on the device, and what passes between it and the host."""

    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self):
        self.work, self.crossings = collections.Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        places = {each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)}
        if "cpu" in places or name in ("_local_scalar_dense", "lift_fresh", "nonzero"):
            self.crossings.append(name)
        self.work[name] += name not in NO_WORK
        return result


@pytest.fixture
def counted(monkeypatch):
    """A counter, which is not taken for a compiler that records."""
    monkeypatch.setattr(_compat, "in_dispatch_mode", lambda: False)
    return Counted()


@pytest.fixture
def with_triton(monkeypatch, counted):
    """Kernels in Triton are counted and not started."""
    monkeypatch.setattr(gpu, "DEVICES", ("meta",))
    monkeypatch.setattr(gpu, "kernels", lambda: object())
    monkeypatch.setattr(gpu, "launch", lambda name, *arguments, **constants: counted.work.update({name: 1}))


def work_of_a_step(counted, weights, config, frozen, width):
    """What the third step of training asks for beyond that of the plain model, with an optimizer that works on all parameters at once."""
    counts, layers = [], nn.Sequential(*[nn.Linear(width, width) for _ in range(weights)])
    for model in (layers, prepare_diffq(layers, torch.zeros(1, width), config)):
        model = model.train().to("meta")
        if frozen and model is not layers:
            model.compression.note(frozen=1)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True), torch.empty(8, width, device="meta")
        for _ in range(3):
            counted.forget()
            optimizer.zero_grad()
            with counted:
                model(x).sum().backward()
                optimizer.step()
        counts.append(counted.work.copy())
    return counts[1] - counts[0]


def per_weight_and_once(counted, frozen=False, width=64, **settings):
    aim = {} if "penalty" in settings else {"target_bits": 4}
    config = DiffQConfig(**aim, **settings)
    with mock.patch.object(diffq_settings, "SENSITIVITY_STEPS", 0):  # never
        few, many = (work_of_a_step(counted, weights, config, frozen, width) for weights in (3, 9))
    each = (sum(many.values()) - sum(few.values())) / 6
    return each, sum(few.values()) - 3 * each


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"group_size": 8}, {"noise": "gaussian"}, {"grid": "half"}, {"grid": "symmetric"}, {"penalty": 1.0}]
)
def test_six_operations_a_weight_and_no_copy_to_or_from_the_device(settings, frozen, counted, with_triton):
    each, once = per_weight_and_once(counted, frozen, **settings)
    assert each <= 6
    assert once <= 150
    assert counted.crossings == []


def test_a_weight_of_many_groups_takes_as_few(counted, with_triton):
    each, once = per_weight_and_once(counted, width=256, group_size=1)
    assert each <= 6
    assert once <= 150
    assert counted.crossings == []


@pytest.mark.parametrize("frozen", [False, True])
def test_without_triton_nothing_is_copied_either(frozen, counted):
    each, _ = per_weight_and_once(counted, frozen)
    assert each <= 140
    assert counted.crossings == []


@pytest.mark.parametrize("grid", ["affine", "half", "float"])
def test_the_search_for_a_range_takes_as_many_operations_for_a_weight_of_any_size(grid, counted):
    bits, found = torch.empty(1, 1, dtype=torch.int32, device="meta"), []
    for rows in (64, 4096):
        counted.forget()
        with counted:
            ranges._least_error_range_op._init_fn(torch.empty(rows, 4096, device="meta"), bits, None, *("channel", 4096) * 2, grid, None)
        found.append(sum(counted.work.values()))
    assert found[0] == found[1] < (1700 if grid == "half" else 1200)
    assert counted.crossings == []


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_converted_weight_takes_as_many_operations_of_any_size(bits, counted):
    found = []
    for rows in (64, 4096):
        levels = torch.empty(rows * 4096 * bits // 8, dtype=torch.uint8, device="meta")
        scale, zero_point = torch.empty(rows, 1, device="meta"), torch.empty(rows, 1, dtype=torch.int32, device="meta")
        counted.forget()
        with counted:
            integers.dequantize_op._init_fn(levels, scale, zero_point, None, bits, [rows, 4096], 0, 4096, torch.float32)
        found.append(sum(counted.work.values()))
    assert found[0] == found[1] <= 20
    assert counted.crossings == []


class No64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.device.type != "cpu" and each.dtype == torch.float64:
                raise TypeError(f"{function} makes float64")
        return result


def test_a_step_needs_no_float64_where_the_device_has_none(counted, monkeypatch):
    assert widest_float(torch.device("mps")) == torch.float32
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("meta",))
    with No64():
        per_weight_and_once(counted)
        per_weight_and_once(counted, group_size=8, noise="gaussian")


def test_a_replayed_draw_is_a_new_one_and_a_seed_repeats_it():
    """The seed is an operation on the device's own generator, which a CUDA graph advances; no number of the host is baked in."""
    device = torch.device("cpu")
    torch.manual_seed(1)
    first, second = draws.draw_seed(device), draws.draw_seed(device)
    torch.manual_seed(1)
    assert draws.draw_seed(device).equal(first)
    assert not first.equal(second)
    assert (first.dtype, first.shape, first.device) == (torch.int64, (1,), device)
