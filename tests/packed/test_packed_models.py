"""Models that went the whole road: prepared, converted, saved, and loaded into the float architecture and back into a converted one."""

import pytest
import torch
from packed_models import assert_equal
from torch import nn

from diffq_fx import DiffQConfig, DiffQWarning, convert_diffq, model_size, prepare, prepare_diffq, setup_optimizer
from diffq_fx.errors import PackedFileError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.methods import STE
from diffq_fx.storage import IntegerWeight
from recipes.models.cifar import ResNet20


class Net(nn.Module):
    """Tied weights, an RNN, both kinds of convolution, BatchNorm, integer and temporary buffers, a frozen weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.up = nn.ConvTranspose1d(48, 32, 3, padding=1)
        self.rnn = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(7))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        h = self.embedding(x).transpose(1, 2)
        h = self.up(self.norm(self.conv(h)).relu()).transpose(1, 2)
        return self.head(self.rnn(h)[0])


X = torch.arange(14).reshape(2, 7)
CONFIGS = {
    "channel": DiffQConfig(target_bits=None),
    "blocks": DiffQConfig(target_bits=None, group_size=8, max_bits=16, init_bits=9),
    "half": DiffQConfig(target_bits=None, grid="symmetric", rest_dtype="float16"),
    "paper": DiffQConfig.paper(penalty=None),
}


def convert(model, config, scope="auto", seed=None):
    prepared = prepare_diffq(model, X, config, scope=scope)
    if seed is not None:
        torch.manual_seed(seed)
        for weight in prepared.compression.quantizers:
            nn.init.normal_(weight.logits)
    with pytest.warns(DiffQWarning, match="never moved"):
        return convert_diffq(prepared)


def trained(config, scope="auto"):
    """A converted model whose statistics and widths are not those of a new one."""
    model = Net()
    model.train()(X)
    return convert(model, config, scope, seed=3)


@pytest.mark.parametrize("compression", ["entropy", "bits"])
@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_whole_road(tmp_path, config, scope, compression):
    converted = trained(config, scope)
    path = save_packed(converted, tmp_path / "net.safetensors", compression)

    twin = load_packed(Net(), path).eval()
    assert torch.equal(twin(X), converted(X))
    assert twin.head.weight is twin.embedding.weight
    for name, module in converted.named_modules():
        if isinstance(module, IntegerWeight):
            assert torch.equal(twin.get_parameter(name.removesuffix("_quantized")), module())

    tensors = load_packed(path)
    assert_equal(tensors, Net().load_state_dict(tensors) and twin.state_dict())

    skeleton = convert(Net(), DiffQConfig(target_bits=None, min_size=config.min_size), scope)
    assert load_packed(skeleton, path) is skeleton
    assert_equal(skeleton.state_dict(), converted.state_dict())
    assert torch.equal(skeleton(X), converted(X))
    assert not any(module.training for module in skeleton.modules())
    again = save_packed(skeleton, tmp_path / "again.safetensors", compression)
    assert again.read_bytes() == path.read_bytes()


def test_half_precision_leftovers_take_half_the_bytes(tmp_path):
    sizes = [save_packed(trained(CONFIGS[name]), tmp_path / name).stat().st_size for name in ("channel", "half")]
    assert sizes[1] < sizes[0]
    assert load_packed(tmp_path / "half")["head.bias"].dtype == torch.float32


def test_a_wrapper_is_looked_through(tmp_path):
    converted = trained(CONFIGS["channel"])
    path = save_packed(nn.DataParallel(converted), tmp_path / "net.safetensors")
    assert load_packed(path).keys() == Net().state_dict().keys()


def test_a_larger_model_and_a_piece_have_names_of_their_own(tmp_path):
    converted = trained(CONFIGS["channel"])
    path = save_packed(nn.Sequential(converted), tmp_path / "net.safetensors")
    assert load_packed(path).keys() == nn.Sequential(Net()).state_dict().keys()
    conv = load_packed(Net().conv, save_packed(converted.conv, tmp_path / "conv.safetensors"))
    assert torch.equal(conv.weight, converted.conv.weight_quantized())


def test_no_quantizer_is_needed_to_load(tmp_path):
    path = save_packed(trained(CONFIGS["channel"]), tmp_path / "net.safetensors")
    plain = load_packed(Net(), path)
    assert all(not type(module).__module__.startswith("diffq_fx") for module in plain.modules())


@pytest.mark.parametrize("shared", [torch.zeros(1).expand(64), torch.zeros(65).unfold(0, 2, 1)[:64], torch.zeros(8, 1).expand(8, 8)])
def test_a_tensor_whose_places_share_memory_is_refused_before_any_other_is_filled(tmp_path, shared):
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    net.register_buffer("shift", shared)
    prepared = prepare(net, torch.zeros(1, 64), STE(bits=4))
    path = save_packed(convert_diffq(prepared), tmp_path / "net.safetensors")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[1].weight.mul_(before["1.weight"].mul_(2))
    with pytest.raises(PackedFileError, match="tensor 'shift' of the model is expanded"):
        load_packed(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.shift = shared.clone(memory_format=torch.contiguous_format)
    assert torch.equal(load_packed(net, path)[1].weight, torch.ones(64))


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(PackedFileError, match=r"save_packed: the Linear was never converted\. Prepare, train and convert it first\."):
        save_packed(nn.Linear(3, 3), path)
    prepared = prepare_diffq(Net(), X, CONFIGS["channel"])
    with pytest.raises(PackedFileError, match=r"is prepared, not converted\. Call convert_diffq"):
        save_packed(prepared, path)
    with pytest.raises(PackedFileError, match="is prepared: load into the float model, or into a converted one"):
        load_packed(prepared, save_packed(trained(CONFIGS["channel"]), tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match='compression must be "entropy" or "bits", got \'zip\''):
        save_packed(trained(CONFIGS["channel"]), path, "zip")
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_level_that_its_width_cannot_hold_is_refused(tmp_path):
    converted = trained(CONFIGS["channel"])
    converted.conv.weight_quantized.bits[3] = 1
    with pytest.raises(PackedFileError, match="a level does not fit the width of its group"):
        save_packed(converted, tmp_path / "net.safetensors")


def test_extra_state_and_odd_tensors_are_refused(tmp_path):
    class Stateful(Net):
        def get_extra_state(self):
            return {"step": 3}

    converted = trained(CONFIGS["channel"])
    converted.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(PackedFileError, match=r"'sparse' is of layout torch\.sparse_coo"):
        save_packed(converted, tmp_path / "net.safetensors")
    converted.register_buffer("sparse", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(PackedFileError, match=r"tensor 'sparse': the type torch\.complex128 cannot be stored; F64, F32"):
        save_packed(converted, tmp_path / "net.safetensors")
    converted.register_buffer("sparse", torch.zeros(2, device="meta"))
    with pytest.raises(PackedFileError, match="'sparse' is on the meta device: it has no values"):
        save_packed(converted, tmp_path / "net.safetensors")
    del converted.sparse
    path = save_packed(converted, tmp_path / "net.safetensors")
    with pytest.raises(PackedFileError, match="'_extra_state' is a dict, not a plain tensor|the file has no '_extra_state'"):
        load_packed(Stateful(), path)
    with pytest.raises(PackedFileError, match="on the meta device"):
        load_packed(Net().to("meta"), path)


def test_wrong_arguments(tmp_path):
    path = save_packed(trained(CONFIGS["channel"]), tmp_path / "net.safetensors")
    for arguments, options in (((3,), {}), ((path, path), {}), ((Net(),), {}), ((Net(), path), {"names": ["conv.weight"]})):
        with pytest.raises(TypeError, match=r"load_packed: expected \(path\), \(path, names=\.\.\.\) or \(model, path\), got"):
            load_packed(*arguments, **options)
    with pytest.raises(PackedFileError, match=r"there is no tensor 'conv\.bais' in the file"):
        load_packed(path, names=["conv.bais"])


def test_the_file_of_a_small_model_is_as_large_as_training_predicts(tmp_path):
    """A quarter of a million weights: names, tables and checksums take no more than floats gain by being coded."""
    torch.manual_seed(0)
    model = prepare_diffq(ResNet20(), torch.randn(2, 3, 32, 32), DiffQConfig(target_mib=0.0722, size_of="packed_file", training_steps=4))
    optimizer = setup_optimizer(torch.optim.Adam(model.parameters(), lr=1e-4), model)
    for _ in range(5):
        model(torch.randn(8, 3, 32, 32)).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = model_size(model, exact=True) * 2**20
    assert predicted == pytest.approx(0.0722 * 2**20, rel=0.01)
    path = save_packed(convert_diffq(model), tmp_path / "m.safetensors")
    assert path.stat().st_size == pytest.approx(predicted, rel=0.01)
    weights = load_packed(ResNet20(), path)
    assert torch.isfinite(weights.conv1.weight).all()


@pytest.mark.parametrize(("width", "off"), [(16, 0.05), (32, 0.05), (75, 0.01)])
def test_a_target_in_mib_counts_all_that_the_file_of_a_tiny_model_holds(width, off, tmp_path):
    """From 700 to 12,000 weights: the header, names, tables, norms and biases are up to seven tenths of the file."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    target = 1050 + 20 * width + 3 / 8 * width * (2 * width + 10)
    model = prepare_diffq(net, torch.randn(2, width), DiffQConfig(target_mib=target / 2**20, size_of="packed_file"))
    with pytest.warns(DiffQWarning, match="the bits never moved"):
        path = save_packed(convert_diffq(model), tmp_path / "m.safetensors")
    assert path.stat().st_size == pytest.approx(target, rel=off)
