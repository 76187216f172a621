"""Product quantization: its noise, its codebooks, the iPQ driver, distillation, and the road to ONNX."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffq_fx import DiffQConfig, Distillation, DivergenceError, PreparationError, bits_report, convert, model_size, prepare
from diffq_fx.methods import STE, ProductQuantization
from diffq_fx.storage.codebook import to_blocks
from diffq_fx.training.ipq import IPQ, FollowTeacher

SETTINGS = {
    "exact": ProductQuantization(entries=4, block_size=4),
    "mean": ProductQuantization(entries=5, block_size=3, noise="mean"),
    "proxy": ProductQuantization(entries=4, block_size=4, noise="proxy", rate=0.3),
    "float16": ProductQuantization(entries=4, block_size=7, entry_dtype="float16"),
    "int8": ProductQuantization(entries=6, block_size=2, entry_dtype="int8"),
    "auto": ProductQuantization(entries=6),
    "one entry": ProductQuantization(entries=1),
}


class Consumers(nn.Module):
    """One of each kind of weight; row lengths that no block divides; the embedding is tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.conv = nn.Conv1d(10, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 9, 3, padding=1)
        self.rnn = nn.GRU(9, 10, batch_first=True)
        self.head = nn.Linear(10, 12)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = torch.relu(self.conv(self.embed(ids).transpose(1, 2)))
        x, _ = self.rnn(self.up(x).transpose(1, 2))
        return self.head(x)


IDS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_is_assigned_and_converts(name, scope):
    method = SETTINGS[name]
    model = prepare(Consumers(), IDS, method, scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model, stage=None):
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).square().mean().backward()
            optimizer.step()

    train(model)
    quantizers = model.compression.quantizers
    assert all(q.centroids.grad is None and not q.is_assigned for q in quantizers)
    with torch.no_grad():
        assert torch.equal(convert(model)(IDS), model.eval()(IDS)), "without the driver convert clusters the weights"
    before = {q.spec.name: model.get_parameter(q.spec.name).detach().clone() for q in quantizers}
    IPQ(model, [["conv", "up"], ["embed"], ["*"]], train).run()
    for quantizer in quantizers:
        assert quantizer.is_assigned
        assert quantizer.centroids.grad is not None
        assert model.get_parameter(quantizer.spec.name).grad is None
    assert torch.equal(model.get_parameter("conv.weight"), before["conv.weight"]), "a quantized weight is not touched any more"
    with torch.no_grad():
        expected = model.eval()(IDS)
        assert torch.equal(model.train()(IDS), expected), "an assigned weight is the same in train and eval"
        converted = convert(model)
        assert torch.equal(converted(IDS), expected)
    before, after = bits_report(model).as_dict(), bits_report(converted).as_dict()
    assert before["sizes"] == after["sizes"]
    assert before["sizes"]["bit_packed"]["total_mib"] == pytest.approx(model_size(model, exact=True))


def test_block_sizes_by_layer_type():
    layers = [nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 6)]
    model = prepare(nn.Sequential(*layers), torch.zeros(1, 4, 4, 4), ProductQuantization(entries=8))
    assert {q.spec.name: q.block_size for q in model.compression.quantizers} == {"0.weight": 9, "1.weight": 4, "3.weight": 8}


@pytest.mark.parametrize("noise", ["exact", "mean", "proxy"])
def test_the_noise_of_a_block(noise):
    net = nn.Linear(400, 50, bias=False)
    rate = 0.25
    model = prepare(net, torch.zeros(1, 400), ProductQuantization(entries=16, block_size=8, noise=noise, rate=rate))
    quantizer = model.weight_quantizer
    weight = net.weight.detach()
    noisy = to_blocks(quantizer(weight), 0, 8)
    blocks = to_blocks(weight, 0, 8)
    kept = blocks / (1 - rate) if noise == "proxy" else blocks
    noised = (noisy != kept).any(1)
    assert float(noised.float().mean()) == pytest.approx(rate, abs=0.03)
    expected = {
        "exact": quantizer.centroids.detach()[torch.cdist(blocks, quantizer.centroids.detach()).argmin(1)],
        "mean": blocks.mean(0).expand_as(blocks),
        "proxy": torch.zeros_like(blocks),
    }[noise]
    torch.testing.assert_close(noisy[noised], expected[noised])
    x = torch.randn(2, 400)
    model(x).sum().backward()
    torch.testing.assert_close(net.weight.grad, x.sum(0).expand(50, 400))


@pytest.mark.parametrize("noise", ["exact", "mean", "proxy"])
def test_rates_zero_and_one(noise):
    net, x = nn.Linear(10, 8), torch.randn(3, 10)
    assert torch.equal(prepare(net, x, ProductQuantization(entries=4, noise=noise, rate=0))(x), net(x))
    all_noised = prepare(net, x, ProductQuantization(entries=4, block_size=3, noise=noise, rate=1))
    if noise == "exact":
        torch.testing.assert_close(all_noised(x), all_noised.eval()(x))
    if noise == "proxy":
        assert torch.equal(all_noised(x), net.bias.expand(3, 8))


@pytest.mark.parametrize("noise", ["exact", "mean", "proxy"])
def test_forwards_leave_every_weight_as_it_was(noise):
    net = Consumers()
    before = {name: (p.detach().clone(), p._version) for name, p in net.named_parameters()}
    follows = {"update_every": 7} if noise == "exact" else {}
    model = prepare(net, IDS, ProductQuantization(entries=4, noise=noise, rate=0.1, **follows))
    for _ in range(30):
        model(IDS)
    for name, parameter in net.named_parameters():
        value, version = before[name]
        assert torch.equal(parameter, value), name
        assert parameter._version == version


def test_the_entries_follow_the_weights_while_training():
    net = nn.Linear(32, 32)
    model = prepare(net, torch.zeros(1, 32), ProductQuantization(entries=8, update_every=5))
    with torch.no_grad():
        net.weight.mul_(3)
    start = model.weight_quantizer.centroids.clone()
    for _ in range(6):
        model(torch.zeros(1, 32))
    moved = model.weight_quantizer.centroids
    assert float(moved.norm()) > 2 * float(start.norm())


def test_entries_get_the_mean_gradient_of_their_blocks():
    net = nn.Linear(6, 4, bias=False)
    model = prepare(net, torch.zeros(1, 6), ProductQuantization(entries=3, block_size=4))
    quantizer = model.weight_quantizer
    quantizer.assign(net.weight)
    upstream = torch.randn(4, 6)
    (model.weight_quantizer(net.weight) * upstream).sum().backward()
    blocks = to_blocks(upstream, 0, 4)
    codes = quantizer.codes.flatten()
    for entry in range(3):
        torch.testing.assert_close(quantizer.centroids.grad[entry], blocks[codes == entry].mean(0))


def test_codes_are_nearest_to_the_entries_as_they_are_stored():
    model = prepare(nn.Linear(64, 64, bias=False), torch.zeros(1, 64), ProductQuantization(entries=32, block_size=4, entry_dtype="int8"))
    stored = convert(model).weight_quantized
    assert stored.codebook.dtype == torch.int8
    entries = stored.codebook.float() * stored.scale
    best = torch.cdist(to_blocks(model.weight.detach(), 0, 4), entries).min(1).values
    found = (to_blocks(model.weight.detach(), 0, 4) - entries[stored.codes_OC().flatten().long()]).norm(dim=1)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def test_beside_diffq_in_one_model():
    mapping = {"embed": ProductQuantization(entries=8, block_size=5), "*": DiffQConfig(target_bits=6)}
    model = prepare(Consumers(), IDS, mapping)
    rows = {w.name: w for w in bits_report(model).weights}
    assert rows["embed.weight"].payload_bits == 24 * 3
    assert rows["embed.weight"].average_bits == pytest.approx(3 / 5)
    assert rows["embed.weight"].scale_bits == 8 * 5 * 32


class Block(nn.Module):
    """A transformer of one layer over tokens."""

    def __init__(self, words=512, size=64):
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.layer = nn.TransformerEncoderLayer(size, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(size, words)

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))


@pytest.mark.parametrize("entry_dtype", ["float32", "float16", "int8"])
def test_a_transformer_with_256_entries_of_8_runs_in_onnxruntime(entry_dtype, tmp_path):
    onnx = pytest.importorskip("onnx")
    from diffq_fx.export import export_onnx

    ids = torch.randint(512, (2, 5))
    model = prepare(Block(), ids, ProductQuantization(entries=256, block_size=8, entry_dtype=entry_dtype))
    converted = convert(model)
    path = tmp_path / "ipq.onnx"
    result = export_onnx(converted, ids, path)
    assert result.max_abs_error < 1e-4
    assert {w.rule for w in result.weights} == {"codebook"}
    assert result.payload_bytes == sum(q.spec.numel for q in model.compression.quantizers) // 8
    assert "Gather" not in result.operators or result.operators["Gather"] == 1, "only the embedding looks up at run time"
    # The size formula is what the file holds.
    held = {i.name: len(i.raw_data) for i in onnx.load(path).graph.initializer}
    for weight in bits_report(converted).weights:
        size = sum(held[name] for name in held if name.startswith(f"{weight.name}.codes") or name.startswith(f"{weight.name}.codebook"))
        assert size * 8 == weight.payload_bits + weight.overhead_bits
        entry_bits = {"float32": 32, "float16": 16, "int8": 8}[entry_dtype]
        assert size * 8 == weight.numel // 8 * 8 + 256 * 8 * entry_bits + 32 * (entry_dtype == "int8")


@pytest.mark.parametrize("shape", ["conv", "transposed", "odd"])
def test_other_weights_in_onnx(shape, tmp_path):
    from diffq_fx.export import export_onnx

    net, x = {
        "conv": (nn.Conv2d(5, 6, 3), torch.randn(1, 5, 6, 6)),
        "transposed": (nn.ConvTranspose1d(5, 6, 3), torch.randn(1, 5, 9)),
        "odd": (nn.Linear(13, 7), torch.randn(2, 13)),
    }[shape]
    for layout in ("onnxruntime", "qdq"):
        converted = convert(prepare(net, x, ProductQuantization(entries=5, block_size=4)))
        assert export_onnx(converted, x, tmp_path / "m.onnx", layout=layout).max_abs_error < 1e-5


# The driver


@pytest.fixture(scope="module")
def task():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(model):
        return float((model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean())

    return net, x[:1400], y[:1400], accuracy


METHOD = ProductQuantization(entries=16, block_size=8)
GROUPS = [["0"], ["2"], ["4"]]


def finetune_on(x, y, lr=0.02):
    def finetune(model, stage):
        torch.manual_seed(stage.index)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        model.train()
        for _ in range(4):
            for batch in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    return finetune


def test_finetuning_in_turn_beats_clustering_alone(task):
    net, x, y, accuracy = task
    reference = accuracy(net)
    at_once = accuracy(prepare(copy.deepcopy(net), x[:2], METHOD))
    model = prepare(copy.deepcopy(net), x[:2], METHOD)
    seen = []
    history = IPQ(model, GROUPS, finetune_on(x, y), progress=seen.append).run()
    assert seen == history
    assert [stage.weights for stage in history] == [("0.weight",), ("2.weight",), ("4.weight",)]
    found = accuracy(model)
    assert found > at_once + 0.03
    assert found > reference - 0.04
    assert accuracy(convert(model)) == found


def test_finetuning_by_a_teacher_needs_no_labels(task):
    net, x, _, accuracy = task
    model = prepare(copy.deepcopy(net), x[:2], METHOD)
    at_once = accuracy(model)
    distillation = Distillation(model, kind="scores", temperature=2.0)
    IPQ(model, GROUPS, FollowTeacher(distillation, lambda: x[torch.randperm(1400)].split(100), lr=0.02, epochs=4)).run()
    assert accuracy(model) > at_once + 0.03
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), distillation.teacher.parameters(), strict=True))


def test_resuming_gives_what_an_uninterrupted_run_gives(task):
    net, x, y, _ = task

    def run(interrupted_at=None, state=None):
        model = prepare(copy.deepcopy(net), x[:2], METHOD)
        tune = finetune_on(x, y)

        def finetune(model, stage):
            if stage.index == interrupted_at:
                raise KeyboardInterrupt
            tune(model, stage)

        driver = IPQ(model, GROUPS, finetune)
        if state is not None:
            driver.load_state_dict(torch.load(state, weights_only=True))
        try:
            driver.run()
        except KeyboardInterrupt:
            buffer = io.BytesIO()
            torch.save(driver.state_dict(), buffer)
            buffer.seek(0)
            return buffer
        return model

    whole, resumed = run(), run(state=run(interrupted_at=1))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_interrupted_finetuning_goes_on_with_its_codebook(task):
    net, x, y, _ = task
    model = prepare(copy.deepcopy(net), x[:2], METHOD)
    tune = finetune_on(x, y)
    entries = []

    def finetune(model, stage):
        entries.append(model.compression.quantizers[0].centroids.detach().clone())
        tune(model, stage)
        if len(entries) == 1:
            entries.append(model.compression.quantizers[0].centroids.detach().clone())
            raise KeyboardInterrupt

    driver = IPQ(model, [["*"]], finetune)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver.run()
    before, tuned, again = entries
    assert not torch.equal(before, tuned)
    assert torch.equal(tuned, again)


def test_a_diverging_finetuning_is_reported_and_undone(task):
    net, x, y, _ = task
    model = prepare(copy.deepcopy(net), x[:2], METHOD)
    with pytest.raises(DivergenceError, match=r"IPQ: the finetuning of stage 0 diverged.*\n  Lower its learning rate"):
        IPQ(model, GROUPS, finetune_on(x, y, lr=1e12)).run()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert bool(torch.isfinite(model(x[:2])).all())


# Bad input


def test_more_entries_than_blocks():
    with pytest.raises(PreparationError, match=r"weight 'weight' of shape \(4, 16\) has 8 blocks of 8, fewer than the 9 entries"):
        prepare(nn.Linear(16, 4), torch.zeros(1, 16), ProductQuantization(entries=9))


def test_a_block_size_that_does_not_divide_is_filled_up_and_counted():
    net, x = nn.Linear(10, 6, bias=False), torch.zeros(1, 10)
    model = prepare(net, x, ProductQuantization(entries=4, block_size=4))
    blocks = to_blocks(net.weight.detach(), 0, 4)
    assert blocks.shape == (18, 4)  # three blocks in each row of ten
    assert not blocks.reshape(6, 12)[:, 10:].any()
    assert convert(model).weight_quantized().shape == (6, 10)
    (weight,) = bits_report(model).weights
    assert weight.payload_bits == 18 * 2, "codes of the blocks that are filled up are counted"
    assert weight.scale_bits == 4 * 4 * 32, "and so are entries of the whole block's length"


def test_a_constant_weight():
    net = nn.Linear(16, 8)
    nn.init.constant_(net.weight, 0.25)
    model = prepare(net, torch.zeros(1, 16), ProductQuantization(entries=4, block_size=5))
    assert torch.equal(convert(model).weight_quantized(), net.weight)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(rate=1.5), "rate must be from 0 to 1, got 1.5"),
        (dict(entries=0), "entries must be a whole number from 1 to 65536, got 0"),
        (dict(block_size=0), r'block_size \(or "auto"\) must be a whole number of at least 1, got 0'),
        (dict(noise="uniform"), "noise must be one of"),
        (dict(entry_dtype="int4"), "entry_dtype must be one of"),
        (dict(update_every=0), "update_every must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        ProductQuantization(**settings)


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        ([["0"]], ValueError, r"2\.weight, 4\.weight are in no group"),
        ([["0"], ["9"]], ValueError, r"pattern '9' matches no product-quantized weight\. The model has 0\.weight, 2\.weight"),
        ([["*"], ["0"]], ValueError, r"group \['0'\] has no weight that is not in an earlier group"),
        (["0", "*"], TypeError, "got the string '0' as a group"),
    ],
)
def test_groups_that_cannot_be(groups, error, match, task):
    model = prepare(copy.deepcopy(task[0]), task[1][:2], METHOD)
    with pytest.raises(error, match=match):
        IPQ(model, groups, lambda model, stage: None)


def test_a_model_without_product_quantization():
    model = prepare(nn.Linear(8, 4), torch.zeros(1, 8), STE())
    with pytest.raises(PreparationError, match="no weight of the model is product-quantized"):
        IPQ(model, [["*"]], lambda model, stage: None)
