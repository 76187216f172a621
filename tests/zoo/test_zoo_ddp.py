"""DistributedDataParallel over two processes: the ranks stay equal and draw different noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffq_fx import model_size
from zoo.checks import converted, loss_of, prepared
from zoo.models import BY_NAME

RANKS = 2


def _train(rank: int, folder: str, name: str, scope: str) -> None:
    """One process: three steps on data of its own, seeded like the other one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    entry = BY_NAME[name]
    wrapped = DistributedDataParallel(prepared(entry, scope=scope))
    model = wrapped.module
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(3):
        args, kwargs = entry.example(variant=rank)
        loss = loss_of(wrapped(*args, **kwargs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    quantizer = model.compression.quantizers[0]
    weight = model.get_parameter(quantizer.spec.name).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        noise = quantizer(weight) - weight
    state = {key: value.clone() for key, value in model.state_dict().items()}
    size = model_size(model, exact=True)
    dist.destroy_process_group()
    with torch.no_grad():
        out = converted(wrapped)(*entry.example()[0])
    torch.save({"state": state, "noise": noise, "losses": losses, "size": size, "out": out}, f"{folder}/rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scope"), [("lstm_lm", "model"), ("resnet20_cifar", "module")])
def test_ranks_stay_equal_and_draw_different_noise(tmp_path: Path, name: str, scope: str):
    torch.multiprocessing.spawn(_train, args=(str(tmp_path), name, scope), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    names = {key for key in first["state"] if "running" not in key}  # each rank has its own statistics of its own data
    before: dict[str, Any] = prepared(BY_NAME[name], scope=scope).state_dict()
    for key in names:
        torch.testing.assert_close(first["state"][key], second["state"][key], rtol=0, atol=0, msg=key)
    for key in before:
        if key.endswith(("weight", "logits")) and before[key].ndim > 1:
            assert not torch.equal(first["state"][key], before[key]), key
    assert first["size"] == second["size"]
    assert first["losses"] != second["losses"]
    for noise in (first["noise"], second["noise"]):
        assert bool(noise.any())
    correlation = torch.corrcoef(torch.stack([first["noise"].flatten(), second["noise"].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.5
    if "running" not in "".join(first["state"]):
        torch.testing.assert_close(first["out"], second["out"], rtol=0, atol=0)
