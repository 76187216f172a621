"""Second moments of what weights are multiplied with: against the energy of outputs, for every way to read a weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx import prepare
from diffq_fx.capture import uses
from diffq_fx.functional.groups import to_rows
from diffq_fx.methods import STE
from diffq_fx.post_training.moments import float_weights, second_moments

pytestmark = pytest.mark.filterwarnings("ignore:prepare")


def moments_of(model, *batches, **settings):
    prepared = prepare(model, batches[0], STE(bits=8))
    quantizers = prepared.compression.quantizers
    with float_weights(quantizers):
        return second_moments(prepared, batches, quantizers, **settings), {each.spec.name: each.spec for each in quantizers}


def energy(weight, spec, found):
    """Sum over rows and inputs of the squared output, from the moments."""
    rows = to_rows(weight.detach(), spec.axis).reshape(len(found.matrix), -1, spec.columns)
    return float(torch.einsum("goi,gij,goj->", rows, found.matrix, rows)) * found.count


CONVOLUTIONS = {
    "1d": nn.Conv1d(8, 6, 5, stride=2, padding=3, dilation=2),
    "2d": nn.Conv2d(8, 16, (3, 2), stride=(2, 1), padding=(1, 2)),
    "2d in groups": nn.Conv2d(8, 16, 3, groups=4, padding="same"),
    "depthwise": nn.Conv2d(8, 16, 3, groups=8),
    "3d": nn.Conv3d(4, 8, 2, padding=1),
    "transposed 1d": nn.ConvTranspose1d(8, 6, 5, stride=3, padding=1, output_padding=2),
    "transposed 2d": nn.ConvTranspose2d(8, 6, (3, 4), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
    "transposed in groups": nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
}


@pytest.mark.parametrize("piece", [uses.PIECE, 500], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, piece, monkeypatch):
    """The moments say how large the output is for any weight, whose columns are in the order of the rows that quantizers work on."""
    monkeypatch.setattr(uses, "PIECE", piece)
    layer = copy.deepcopy(CONVOLUTIONS[name])
    dims = layer.weight.ndim - 2
    inputs = torch.randn(3, layer.in_channels, *(11, 9, 5)[:dims])
    found, specs = moments_of(layer, inputs)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.zero_()
        expected = float(layer(inputs).square().sum())
    assert energy(layer.weight, specs["weight"], found["weight"]) == pytest.approx(expected, rel=1e-4)


class Reads(nn.Module):
    """One 12 x 16 weight read by a function."""

    def __init__(self, read, shape=(12, 16)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.read = read

    def forward(self, x):
        return self.read(x, self.weight)


READS = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul of a view": lambda x, w: torch.matmul(x, w.mT),
    "weight on the left": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "addmm": lambda x, w: torch.addmm(torch.zeros(12), x.reshape(-1, 16), w.t()),
    "bmm of an expanded view": lambda x, w: torch.bmm(x, w.t().expand(len(x), 16, 12)),
    "vectors": lambda x, w: torch.stack([torch.mv(w, row) for row in x.reshape(-1, 16)]),
    "convolution of one position": lambda x, w: F.conv1d(x.mT, w[:, :, None]),
    "in another type": lambda x, w: F.linear(x.double(), w.double()),
    "a copy in another order": lambda x, w: x @ w.t().contiguous(),
    "by halves of its columns": lambda x, w: F.linear(x[..., :8], w[:, :8]) + F.linear(x[..., 8:], w[:, 8:]),
    "in inference mode": lambda x, w: _in_inference_mode(x, w),
}


def _in_inference_mode(x, w):
    with torch.inference_mode(not torch.is_grad_enabled()):
        return F.linear(x, w)


@pytest.mark.parametrize("read", READS)
def test_functions(read):
    inputs = torch.randn(2, 3, 16)
    expected = inputs.reshape(-1, 16).mT @ inputs.reshape(-1, 16) / 6
    if read == "by halves of its columns":  # how the halves go together is not known
        expected = expected * torch.block_diag(torch.ones(8, 8), torch.ones(8, 8))
    found, _ = moments_of(Reads(READS[read]), inputs)
    assert found["weight"].reason == ""
    assert found["weight"].count == 6
    torch.testing.assert_close(found["weight"].matrix[0], expected)


def test_a_weight_whose_outputs_come_last():
    inputs = torch.randn(2, 3, 12)
    found, specs = moments_of(Reads(lambda x, w: x @ w), inputs)
    assert specs["weight"].axis == 1
    torch.testing.assert_close(found["weight"].matrix[0], inputs.reshape(-1, 12).mT @ inputs.reshape(-1, 12) / 6)


def test_rows_with_inputs_of_their_own():
    """Query, key and value projections in one weight: of attention over another sequence they have different inputs."""
    query, memory = torch.randn(5, 1, 32), torch.randn(7, 1, 32)
    found, _ = moments_of(nn.MultiheadAttention(32, 4, bias=False), (query, memory, memory))
    energies = found["in_proj_weight"].matrix * found["in_proj_weight"].count
    for part, inputs in zip(energies, (query, memory, memory), strict=True):
        torch.testing.assert_close(part, inputs[:, 0].mT @ inputs[:, 0])


@pytest.mark.parametrize("layer", [nn.LSTM(8, 12, num_layers=2), nn.GRU(8, 12), nn.TransformerEncoderLayer(8, 2, 16), nn.GRUCell(8, 12)])
def test_layers_that_are_called_whole(layer):
    inputs = torch.randn(*([6, 8] if isinstance(layer, nn.GRUCell) else [3, 2, 8]))
    found, _ = moments_of(layer, inputs)
    assert all(each.matrix is not None and not each.reason for each in found.values())
    if "weight_ih_l0" in found:
        torch.testing.assert_close(found["weight_ih_l0"].matrix[0], inputs.reshape(-1, 8).mT @ inputs.reshape(-1, 8) / 6)
        assert found["weight_hh_l0"].diagonal.max() > 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def test_a_tied_weight_has_what_both_readers_tell():
    ids = torch.tensor([[1, 1, 2], [3, 1, 2]])
    model = Tied()
    found, _ = moments_of(model, ids)
    inputs = model.table(ids).reshape(-1, 16).detach()
    torch.testing.assert_close(found["table.weight"].matrix[0], inputs.mT @ inputs / 6)


LOOK_UPS = {
    "embedding": lambda ids, w: F.embedding(ids, w),
    "index_select": lambda ids, w: torch.index_select(w, 0, ids.reshape(-1)),
    "index": lambda ids, w: w[ids],
    "embedding_bag": lambda ids, w: F.embedding_bag(ids, w),
    "one-hot product": lambda ids, w: torch.einsum("btv,vi->bti", F.one_hot(ids, 12).float(), w),
}


@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_tables(look_up):
    ids = torch.tensor([[0, 3], [3, 11]])
    found, _ = moments_of(Reads(LOOK_UPS[look_up]), ids)
    assert found["weight"].importance is None
    assert found["weight"].reason == "rows are looked up"


def test_other_readers_are_named():
    found, _ = moments_of(Reads(lambda x, w: x[..., :12, None] * w), torch.randn(2, 12))
    assert found["weight"].matrix is None
    assert found["weight"].reason == "read by mul"


def test_a_weight_that_no_batch_reads():
    class Idle(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.idle = nn.Linear(16, 16)

    found, _ = moments_of(Idle(), torch.randn(2, 16))
    assert found["idle.weight"].reason == "no batch reads it"


def test_long_rows_have_the_diagonal_alone():
    inputs = torch.randn(5, 16)
    found, _ = moments_of(Reads(F.linear), inputs, most_columns=15)
    assert found["weight"].matrix is None
    torch.testing.assert_close(found["weight"].importance, inputs.square().mean(0))


def test_means_over_batches():
    batches = [torch.randn(5, 16), torch.randn(2, 16)]
    found, _ = moments_of(Reads(F.linear), *batches)
    inputs = torch.cat(batches)
    torch.testing.assert_close(found["weight"].matrix[0], inputs.mT @ inputs / 7)


def test_an_input_that_changes_in_place_between_two_weights():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(2))

    found, _ = moments_of(Both(), torch.randn(4, 16))
    torch.testing.assert_close(found["b.weight"].matrix, 4 * found["a.weight"].matrix)


def test_rounded_layers_give_their_own_inputs():
    """In GPTQ a layer sees what the rounded layers before it give; with float_weights what the float ones give."""
    model, inputs = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(8, 16)
    prepared = prepare(model, inputs, STE(bits=2))
    first, second = prepared.compression.quantizers
    rounded = F.linear(inputs, first.rounded_weight(model[0].weight.detach()), model[0].bias).detach()
    torch.testing.assert_close(second_moments(prepared, [inputs], [second])["1.weight"].matrix[0], rounded.mT @ rounded / 8)
    with float_weights([first]):
        found = second_moments(prepared, [inputs], [second])
    as_float = model[0](inputs).detach()
    torch.testing.assert_close(found["1.weight"].matrix[0], as_float.mT @ as_float / 8)


def test_the_model_is_left_as_it_was():
    model, inputs = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 16)), torch.randn(4, 16)
    prepared = prepare(model, inputs, STE(bits=4)).train()
    prepared[1].eval()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    modes = [module.training for module in prepared.modules()]
    state = torch.get_rng_state()

    def batches():
        yield inputs
        raise KeyboardInterrupt

    for several in ([inputs], batches()):
        try:
            second_moments(prepared, several, prepared.compression.quantizers)
        except KeyboardInterrupt:
            pass
        assert [module.training for module in prepared.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())
        assert torch.backends.mha.get_fastpath_enabled()
        assert prepared(inputs).requires_grad
        torch.set_rng_state(state)


def test_bad_input():
    prepared = prepare(nn.Linear(16, 16), torch.zeros(1, 16), STE(bits=4))
    with pytest.raises(ValueError, match="there is no batch"):
        second_moments(prepared, [], prepared.compression.quantizers)
    with pytest.raises(ValueError, match=r"'weight' is multiplied with is not finite in 31 of 256 places"):
        second_moments(prepared, [torch.zeros(1, 16).index_fill(1, torch.tensor([3]), float("nan"))], prepared.compression.quantizers)
