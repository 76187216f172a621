"""FSDP2 (``fully_shard``): two ranks train as one process does, hold the size, agree on the bits, and save for any number of ranks."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffq_fx import DiffQConfig, DiffQError, convert_diffq, model_size, prepare_diffq

BATCH, STEPS, HALF = 16, 14, 7
SETTINGS = {
    "channels": {"target_bits": 4.0, "training_steps": 40, "sensitivity_steps": 3, "noise_steps": 8},
    "blocks": {"target_bits": 4.0, "training_steps": 40, "sensitivity_steps": 3, "noise_steps": 8, "group_size": 8},
    "penalty": {"target_bits": None, "penalty": 50.0, "training_steps": 40, "noise_steps": 8},
}


class Net(nn.Module):
    """Layers of sizes that two ranks do not divide evenly."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 63), nn.Linear(63, 48), nn.Linear(48, 5)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def make(settings, scope):
    torch.manual_seed(0)
    return prepare_diffq(Net(), torch.randn(2, 16), DiffQConfig(**SETTINGS[settings]), scope=scope)


def batch(step, rank, ranks):
    x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))
    return x.chunk(ranks)[rank]


def train(model, optimizer, steps, rank=0, ranks=1):
    losses = []
    for step in steps:
        x = batch(step, rank, ranks)
        torch.manual_seed(step)  # the same noise on every rank, so that the ranks do what one process does
        loss = F.cross_entropy(model(x), x[:, :5].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def widths(model):
    model.eval()(torch.zeros(1, 16))
    found = torch.cat([quantizer.width.reshape(-1) for quantizer in model.compression.learned])
    model.train()
    return found.clone()


def shard(model, per_layer, mesh):
    for name in ("first", "second", "head") if per_layer else ():
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_two_processes(function, *arguments):
    torch.multiprocessing.spawn(_in_a_process, args=(function, *arguments), nprocs=2)


def _in_a_process(rank, function, folder, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{function.__name__}", rank=rank, world_size=2)
    try:
        function(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()


def _train_sharded(rank, folder, settings, scope, per_layer):
    model = shard(make(settings, scope), per_layer, init_device_mesh("cpu", (2,)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = adam(model)
    losses = torch.stack(train(model, optimizer, range(STEPS), rank, 2))
    dist.all_reduce(losses)
    own = {"losses": losses / 2, "widths": widths(model), "size": model_size(model, exact=True)}
    torch.save({**own, "frozen": model.compression.frozen}, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "scope", "per_layer"), [("channels", "model", False), ("blocks", "module", True), ("penalty", "module", True)])
def test_two_ranks_train_as_one_process(tmp_path: Path, settings, scope, per_layer):
    in_two_processes(_train_sharded, str(tmp_path), settings, scope, per_layer)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["widths"], second["widths"])
    assert first["size"] == second["size"]
    assert first["frozen"]
    model = make(settings, scope)
    losses = torch.stack(train(model, adam(model), range(STEPS)))
    torch.testing.assert_close(first["losses"], losses, rtol=1e-3, atol=1e-4)
    assert (first["widths"] != widths(model)).float().mean() < 0.05
    if settings != "penalty":
        limit = SETTINGS[settings]["target_bits"] * sum(m.weight.numel() for m in Net().children()) / 8 / 2**20
        rest = sum(m.bias.numel() for m in Net().children()) * 4 / 2**20
        assert 0.98 * limit < first["size"] - rest <= limit


def _save(folder, name, model, optimizer):
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{name}")


def _load(folder, name, model, optimizer):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=f"{folder}/{name}")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def _train_and_save(rank, folder, scope):
    model = shard(make("channels", scope), scope == "module", init_device_mesh("cpu", (2,)))
    optimizer = adam(model)
    train(model, optimizer, range(HALF), rank, 2)
    _save(folder, "two", model, optimizer)
    losses = train(model, optimizer, range(HALF, STEPS), rank, 2)
    torch.save({"losses": torch.stack(losses), "widths": widths(model)}, f"{folder}/whole{rank}.pt")


def _load_and_train(rank, folder, scope):
    model = shard(make("channels", scope), scope == "module", init_device_mesh("cpu", (2,)))
    optimizer = adam(model)
    _load(folder, "one", model, optimizer)
    losses = train(model, optimizer, range(HALF, STEPS), rank, 2)
    torch.save({"losses": torch.stack(losses), "widths": widths(model)}, f"{folder}/resumed{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(tmp_path: Path, scope):
    in_two_processes(_train_and_save, str(tmp_path), scope)
    model = make("channels", scope)
    optimizer = adam(model)
    _load(str(tmp_path), "two", model, optimizer)
    assert int(model.compression.steps) == HALF
    _save(str(tmp_path), "one", model, optimizer)
    in_two_processes(_load_and_train, str(tmp_path), scope)
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / f"{kind}{rank}.pt") for kind in ("whole", "resumed"))
        assert torch.equal(whole["losses"], resumed["losses"])
        assert torch.equal(whole["widths"], resumed["widths"])


def _refuse(rank, folder):
    """What would go wrong without a word: a layer of model scope that is sharded by itself is never called, so nothing gathers its weight."""
    model = make("channels", "model")
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.get_submodule("first"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(DiffQError, match=r"first\.weight.*sharded"):
        model(torch.zeros(1, 16))


@pytest.mark.slow
def test_a_layer_of_model_scope_that_is_sharded_by_itself_is_refused(tmp_path):
    in_two_processes(_refuse, str(tmp_path))


def _convert(rank, folder):
    plain = make("channels", "module")
    model = shard(copy.deepcopy(plain), True, init_device_mesh("cpu", (2,)))
    train(model, adam(model), range(3), rank, 2)
    with pytest.raises(DiffQError, match="sharded"):
        convert_diffq(model)


@pytest.mark.slow
def test_convert_says_how_to_gather_a_sharded_model(tmp_path):
    in_two_processes(_convert, str(tmp_path))
