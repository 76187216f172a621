"""What a training step asks of a device: operations and host copies for each weight, counted on tensors without memory.

Device "meta" stands for a GPU: whatever waits for the device or copies from it is an error there.
"""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffq_fx import DiffQConfig, _compat, convert_diffq, prepare_diffq
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.functional.precision import widest_float
from diffq_fx.kernels import draws, eager, gpu, least_error_range, moments, size_of_logits
from diffq_fx.storage import packing

WEIGHTS = 40
NO_WORK = set("view alias detach slice select expand unsqueeze squeeze t transpose unbind split promote_types _unsafe_view".split())
NO_WORK |= {"empty", "empty_like", "new_empty", "empty_strided", "as_strided", "permute"}  # memory of the caching allocator


class Counted(TorchDispatchMode):
    """Operations that start work on the device, and what passes between it and the host."""

    def __init__(self):
        super().__init__()
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


def work_of_a_step(counted, prepared, frozen=False):
    """Counts of the third step of training, in which torch's own optimizer and the model's layers have their part."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(WEIGHTS)])
    if prepared is not None:
        model = prepare_diffq(model, torch.zeros(1, 64), prepared)
    model = model.train().to("meta")
    if frozen:
        model.compression.note(frozen=True)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.empty(8, 64, device="meta")

    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    step()
    counted.work.clear()
    with counted:
        step()
    return counted.work.copy()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("settings", [{}, {"group_size": 8}, {"noise": "gaussian"}, {"grid": "symmetric"}])
def test_six_operations_a_weight_and_no_copy_to_or_from_the_device(settings, frozen, counted, with_triton):
    plain = work_of_a_step(counted, None)
    config = DiffQConfig(target_bits=4, sensitivity_steps=0, **settings)
    own = work_of_a_step(counted, config, frozen) - plain
    assert sum(own.values()) / WEIGHTS <= 6, own
    assert own["reduce_noise" if not frozen else "slope_of_clip"] == WEIGHTS
    assert counted.crossings == []


@pytest.mark.parametrize("frozen", [False, True])
def test_without_triton_nothing_is_copied_either(frozen, counted):
    plain = work_of_a_step(counted, None)
    own = work_of_a_step(counted, DiffQConfig(target_bits=4, sensitivity_steps=0), frozen) - plain
    assert sum(own.values()) / WEIGHTS <= 110, own
    assert counted.crossings == []


@pytest.mark.parametrize("columns", [4096, 64])
def test_the_search_for_a_range_takes_as_many_operations_for_any_size(columns, counted):
    rows, layout = torch.empty(4096, columns, device="meta"), GroupLayout.of(4096, columns, "channel")
    with counted:
        torch.ops.diffq_fx.least_error_range.default  # noqa: B018 - the operator itself is one; its body is counted
        least_error_range.__globals__["_search"](rows, torch.empty(4096, 1, dtype=torch.int32, device="meta"), layout, layout, "affine")
    assert sum(counted.work.values()) < 1200
    assert counted.crossings == []
