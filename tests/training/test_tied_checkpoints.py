"""A tied weight has one quantizer in one place, so that torch.distributed.checkpoint, DDP and pickle meet its parameters once."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from diffq_fx import DiffQConfig, convert_diffq, prepare
from diffq_fx.methods import LSQ

X = torch.arange(8).reshape(2, 4)


class Tied(nn.Module):
    """An embedding whose weight makes the scores, and once more in a layer below."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64, bias=False)
        self.below = nn.ModuleList([nn.Linear(16, 64, bias=False)])
        self.head.weight = self.below[0].weight = self.table.weight

    def forward(self, x):
        hidden = torch.tanh(self.mix(self.table(x)))
        return self.head(hidden) + self.below[0](hidden)


def make(scope, method):
    torch.manual_seed(0)
    return prepare(Tied(), X, LSQ(bits=4) if method == "LSQ" else DiffQConfig(target_bits=5, training_steps=50), scope=scope)


def train(model, optimizer, steps=6):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X).flatten(0, 1), X.flatten()).backward()
        optimizer.step()


@pytest.fixture(params=["plain", "DDP"])
def wrap(request, tmp_path):
    if request.param == "plain":
        yield lambda model: model
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["DiffQ", "LSQ"])
@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_checkpoint_of_a_tied_model_resumes(scope, method, wrap):
    model, other = (wrap(make(scope, method)) for _ in range(2))
    optimizer, again = (torch.optim.AdamW(each.parameters(), 1e-2) for each in (model, other))
    train(model, optimizer)
    states = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(other, again, model_state_dict=states[0], optim_state_dict=states[1])
    train(model, optimizer)
    train(other, again)
    for (name, found), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("scope", ["model", "module"])
def test_its_parameters_have_one_name_each_and_all_layers_read_them(scope):
    model = make(scope, "DiffQ")
    train(model, torch.optim.AdamW(model.parameters(), 1e-2), 1)
    names = [name for name in model.state_dict() if "_quantizer.logits" in name]
    assert names == ["table.weight_quantizer.logits", "mix.weight_quantizer.logits"]
    model.eval()
    for each in (copy.deepcopy(model), torch.load(io.BytesIO(_saved(model)), weights_only=False)):
        with torch.no_grad():
            each.compression.quantizers[0].logits.sub_(1)
        rounded = each.compression.quantizers[0](each.table.weight)
        hidden = torch.tanh(nn.functional.linear(rounded[X], each.compression.quantizers[1](each.mix.weight), each.mix.bias))
        torch.testing.assert_close(each(X), 2 * nn.functional.linear(hidden, rounded))
        assert not torch.equal(each(X), model(X))
        assert torch.equal(convert_diffq(each)(X), each(X))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()
