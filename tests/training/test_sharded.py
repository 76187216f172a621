"""FSDP2 (``fully_shard``): two ranks train as one process does, hold the size, agree on the bits, and save for any number of ranks."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from diffq_fx import ConversionError, DiffQConfig, DiffQError, convert_diffq, model_size, prepare_diffq
from diffq_fx.kernels import draws

BATCH, STEPS, HALF = 16, 14, 7
SETTINGS = {
    "channels": {"target_bits": 4.0, "training_steps": 40},
    "blocks": {"target_bits": 4.0, "training_steps": 40, "group_size": 8},
    "penalty": {"target_bits": None, "penalty": 50.0, "training_steps": 40},
}
CASES = {
    "whole model": ("channels", "model", False),
    "each layer": ("blocks", "module", True),
    "penalty": ("penalty", "module", True),
    "each layer of a graph": ("channels", "model", True),
}
"""Settings, scope, and whether layers are sharded one by one."""


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
        torch.manual_seed(step)
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


def _in_a_process(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{function.__name__}", rank=rank, world_size=2)
    try:
        with mock.patch.object(draws, "_rank", return_value=0):  # ranks draw different noise; here they do what one process does
            function(rank, Path(folder), init_device_mesh("cpu", (2,)))
    finally:
        dist.destroy_process_group()


def in_two_processes(function, folder):
    torch.multiprocessing.spawn(_in_a_process, args=(function, str(folder)), nprocs=2)


def _train_all(rank, folder, mesh):
    for name, (settings, scope, per_layer) in CASES.items():
        model = shard(make(settings, scope), per_layer, mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        losses = torch.stack(train(model, adam(model), range(STEPS), rank, 2))
        dist.all_reduce(losses)
        own = {"losses": losses / 2, "widths": widths(model), "size": model_size(model, exact=True)}
        torch.save({**own, "frozen": model.compression.frozen}, folder / f"{name}{rank}.pt")
    with pytest.raises(ConversionError, match=r"weight 'first\.weight' is sharded over ranks"):
        convert_diffq(model)
    _refuse(mesh)


def _refuse(mesh):
    """What would go wrong without a word: nothing gathers the weight of a layer that tensor parallelism has divided."""
    parallel = make("channels", "module")
    parallel.first.weight = nn.Parameter(distribute_tensor(parallel.first.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(DiffQError, match=r"weight 'first\.weight' is a DTensor where its quantizer reads it"):
        parallel(torch.zeros(1, 16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    in_two_processes(_train_all, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(trained, name):
    first, second = (torch.load(trained / f"{name}{rank}.pt") for rank in range(2))
    assert torch.equal(first["widths"], second["widths"])
    assert first["size"] == second["size"]
    assert first["frozen"]
    settings, scope, _ = CASES[name]
    model = make(settings, scope)
    losses = torch.stack(train(model, adam(model), range(STEPS)))
    torch.testing.assert_close(first["losses"], losses, rtol=1e-3, atol=1e-4)
    assert (first["widths"] != widths(model)).float().mean() < 0.05
    if settings != "penalty":
        layers = list(Net().children())
        limit = SETTINGS[settings]["target_bits"] * sum(layer.weight.numel() for layer in layers) / 8 / 2**20
        rest = sum(layer.bias.numel() for layer in layers) * 4 / 2**20
        assert 0.98 * limit < first["size"] - rest <= limit


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("whole", [False, True], ids=["its parts", "whole model"])
@pytest.mark.parametrize("keeps_names", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_flat_parameters_of_fsdp1_are_refused_before_a_step(keeps_names, whole, mode, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = make("channels", "module")
        wrap = partial(FullyShardedDataParallel, use_orig_params=keeps_names, device_id=torch.device("cpu"))
        if whole:
            model = wrap(model)
        else:
            model.second = wrap(model.second)
        with pytest.raises(DiffQError, match=r"weight '\w+\.weight' is a part of a flat parameter .* use fully_shard \(FSDP2\)"):
            model.train(mode == "train")(batch(0, 0, 1)).sum().backward()
    finally:
        dist.destroy_process_group()


def _save(path, model, optimizer):
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)


def _load(path, model, optimizer):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def _finish(model, optimizer, rank, path):
    losses = train(model, optimizer, range(HALF, STEPS), rank, 2)
    torch.save({"losses": torch.stack(losses), "widths": widths(model)}, path)


def _train_and_save(rank, folder, mesh):
    for scope in ("model", "module"):
        model = shard(make("channels", scope), scope == "module", mesh)
        optimizer = adam(model)
        train(model, optimizer, range(HALF), rank, 2)
        _save(folder / f"two-{scope}", model, optimizer)
        _finish(model, optimizer, rank, folder / f"whole-{scope}{rank}.pt")


def _load_and_train(rank, folder, mesh):
    for scope in ("model", "module"):
        model = shard(make("channels", scope), scope == "module", mesh)
        optimizer = adam(model)
        _load(folder / f"one-{scope}", model, optimizer)
        _finish(model, optimizer, rank, folder / f"resumed-{scope}{rank}.pt")


@pytest.mark.slow
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(tmp_path):
    in_two_processes(_train_and_save, tmp_path)
    for scope in ("model", "module"):
        model = make("channels", scope)
        optimizer = adam(model)
        _load(tmp_path / f"two-{scope}", model, optimizer)
        assert int(model.compression.steps) == HALF
        _save(tmp_path / f"one-{scope}", model, optimizer)
    in_two_processes(_load_and_train, tmp_path)
    for name in ("model0", "model1", "module0", "module1"):
        whole, resumed = (torch.load(tmp_path / f"{kind}-{name}.pt") for kind in ("whole", "resumed"))
        assert torch.equal(whole["losses"], resumed["losses"])
        assert torch.equal(whole["widths"], resumed["widths"])
