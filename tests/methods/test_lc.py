"""LC quantization: the loop, its baselines, its penalty in one's own loop, and the road to ONNX."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffq_fx import DivergenceError, PreparationError, bits_report, convert, model_size, prepare
from diffq_fx.methods import LC, STE
from diffq_fx.training.lc import LCLoop, counted_ratio, geometric_schedule, lc_penalty, lc_step

KINDS = {
    "adaptive 2": LC(entries=2),
    "adaptive 5": LC(entries=5),
    "adaptive 1": LC(entries=1),
    "binary": LC(codebook="binary"),
    "scaled binary": LC(codebook="scaled_binary"),
    "ternary": LC(codebook="ternary"),
    "scaled ternary": LC(codebook="scaled_ternary"),
    "powers of two": LC(codebook="powers_of_two", smallest_power=5),
    "own": LC(codebook=(-1.0, 0.25, 0.5)),
    "own scaled": LC(codebook=(-1.0, 0.25, 0.5), learn_scale=True),
    "shared": LC(entries=4, shared=True),
}


class Consumers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.conv = nn.ConvTranspose1d(10, 6, 3, padding=1)
        self.rnn = nn.GRU(6, 10, batch_first=True)
        self.head = nn.Linear(10, 12)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x, _ = self.rnn(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(x)


IDS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0))


def sgd(model, batches, rate=0.2):
    """The paper's training function: SGD with momentum, the rate falling and below 1 / mu."""

    def train(model, step):
        model.train()
        limited = min(rate * 0.95**step.index, step.largest_rate)
        optimizer = torch.optim.SGD(model.parameters(), lr=limited, momentum=0.9, nesterov=True)
        for x, y in batches():
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + step.penalty()).backward()
            optimizer.step()

    return train


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("name", KINDS)
def test_every_codebook_trains_and_converts(name, scope):
    method = KINDS[name]
    net = Consumers()
    model = prepare(net, IDS, method, scope=scope)
    assert torch.equal(model(IDS), net(IDS)), "training computes in float"
    with torch.no_grad():  # with a graph for gradients torch takes other kernels for layers whose weights need them
        direct = model.eval()(IDS)
        assert torch.equal(convert(model)(IDS), direct), "without a C step convert is direct compression"
    lc_step(model.train(), next_mu=1e-2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(IDS).square().mean() + lc_penalty(model)).backward()
        optimizer.step()
    distance = lc_step(model, next_mu=1e-1)
    assert 0 < distance < 1 or name in ("binary", "adaptive 1")
    with torch.no_grad():
        expected = model.eval()(IDS)
        converted = convert(model)
        assert torch.equal(converted(IDS), expected)
    for quantizer in model.compression.quantizers:
        stored = next(m for m in converted.modules() if getattr(getattr(m, "spec", None), "name", None) == quantizer.spec.name)
        assert stored().unique().numel() <= method.num_entries
    before, after = bits_report(model).as_dict(), bits_report(converted).as_dict()
    assert before["sizes"] == after["sizes"]
    assert before["sizes"]["bit_packed"]["total_mib"] == pytest.approx(model_size(model, exact=True))


def test_a_shared_codebook_is_one_for_all_weights():
    model = prepare(Consumers(), IDS, {"rnn": LC(entries=3), "*": LC(entries=4, shared=True)})
    lc_step(model, next_mu=0)
    by_name = {q.spec.name: q.entries for q in model.compression.quantizers}
    assert torch.equal(by_name["embed.weight"], by_name["conv.weight"])
    assert not torch.equal(by_name["rnn.weight_ih_l0"], by_name["rnn.weight_hh_l0"])


def test_c_step_and_multipliers_by_hand():
    net = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0, -6.0]]))
    model = prepare(net, torch.zeros(1, 3), LC(codebook="scaled_binary"))
    (quantizer,) = model.compression.quantizers
    lc_step(model, next_mu=2.0, augmented=False)
    assert quantizer.compressed.tolist() == [[3, 3, -3]]
    difference = torch.tensor([[-2.0, -1.0, -3.0]])
    assert lc_penalty(model).item() == pytest.approx(float(difference.square().sum()))  # mu / 2 = 1, lambda = 0
    lc_step(model, next_mu=4.0)
    assert torch.equal(quantizer.multipliers, -2.0 * difference)
    lc_penalty(model).backward()
    torch.testing.assert_close(net.weight.grad, 4.0 * difference - quantizer.multipliers)
    # The next C step compresses w - lambda / mu.
    torch.testing.assert_close(quantizer.target(), net.weight.detach() + 2.0 * difference / 4.0)


def test_quadratic_penalty_leaves_the_multipliers_at_zero():
    model = prepare(nn.Linear(8, 8), torch.zeros(1, 8), LC(entries=2))
    for mu in (0.1, 0.2, 0.4):
        lc_step(model, next_mu=mu, augmented=False)
    assert not model.weight_quantizer.multipliers.any()


@pytest.fixture(scope="module")
def task():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()

    def batches(epochs=1):
        for _ in range(epochs):
            for batch in torch.randperm(1400).split(100):
                yield x[batch], y[batch]

    @torch.no_grad()
    def accuracy(model):
        return float((model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean())

    return net, batches, accuracy, x


def fresh(task, method):
    net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    net.load_state_dict(task[0].state_dict())
    return prepare(net, torch.zeros(1, 64), method)


SCHEDULE = geometric_schedule(1e-3, 1.5, 30)


@pytest.mark.parametrize("entries", [2, 4])
def test_the_augmented_lagrangian_meets_the_codebook_and_beats_direct_compression(task, entries, tmp_path):
    from diffq_fx.export import export_onnx

    _, batches, accuracy, x = task
    model = fresh(task, LC(entries=entries))
    lc_step(model, next_mu=0)
    direct = accuracy(model)
    model = fresh(task, LC(entries=entries))
    seen = []
    history = LCLoop(model, sgd(model, lambda: batches(3)), schedule=SCHEDULE, progress=seen.append).run()
    assert seen == history
    assert history[-1].distance <= 1e-3
    assert accuracy(model) > max(direct + 0.005, 0.93)
    converted = convert(model)
    assert accuracy(converted) == accuracy(model)
    result = export_onnx(converted, x[:4], tmp_path / "lc.onnx")
    assert result.payload_bytes == (3072 + 480) * entries // 2 // 8
    assert all(w.bits == {entries // 2: w.numel} for w in result.weights)


@pytest.mark.parametrize(
    ("method", "container", "operator"),
    [
        (LC(codebook="binary"), "INT2", "DequantizeLinear"),
        (LC(codebook="scaled_binary"), "INT2", "DequantizeLinear"),
        (LC(codebook="ternary"), "INT2", "DequantizeLinear"),
        (LC(codebook="scaled_ternary"), "INT2", "DequantizeLinear"),
        (LC(codebook="powers_of_two", smallest_power=2), "INT4", "DequantizeLinear"),
        (LC(codebook="powers_of_two", smallest_power=5), "UINT4", "Gather"),
        (LC(entries=2), "UINT2", "Gather"),
        (LC(entries=16), "UINT4", "Gather"),
        (LC(entries=17), "UINT8", "Gather"),
    ],
    ids=str,
)
def test_what_a_codebook_is_in_onnx(method, container, operator, tmp_path):
    """Integers where they are exact and no wider than the codes, else the codes and a Gather; parity is checked by the export."""
    onnx = pytest.importorskip("onnx")
    from diffq_fx.export import export_onnx

    x = torch.randn(2, 16)
    model = prepare(nn.Linear(16, 8), x, method)
    lc_step(model, next_mu=0)
    result = export_onnx(convert(model), x, tmp_path / "codes.onnx", layout="qdq")
    graph = onnx.load(result.path).graph
    stored = max(graph.initializer, key=lambda each: torch.Size(each.dims).numel())
    assert onnx.TensorProto.DataType.Name(stored.data_type) == container
    assert torch.Size(stored.dims).numel() == 128
    assert operator in {node.op_type for node in graph.node}
    assert result.max_abs_error < 1e-5


def test_codes_of_one_entry_are_read_back(tmp_path):
    pytest.importorskip("onnx")
    from diffq_fx.export import export_onnx, read_metadata

    x = torch.randn(2, 16)
    model = prepare(nn.Linear(16, 8), x, LC(entries=1))
    lc_step(model, next_mu=0)
    path = export_onnx(convert(model), x, tmp_path / "one.onnx").path
    assert [(each.name, each.bits) for each in read_metadata(path).weights] == [("weight", {0: 128})]


def test_resuming_gives_what_an_uninterrupted_run_gives(task):
    _, batches, _, _ = task

    def run(interrupted_at=None, state=None):
        model = fresh(task, LC(entries=2))

        def train(model, step):
            torch.manual_seed(step.index)
            if step.index == interrupted_at:
                raise KeyboardInterrupt
            sgd(model, batches)(model, step)

        loop = LCLoop(model, train, schedule=SCHEDULE[:5])
        if state is not None:
            loop.load_state_dict(torch.load(state, weights_only=True))
        try:
            loop.run()
        except KeyboardInterrupt:
            buffer = io.BytesIO()
            torch.save(loop.state_dict(), buffer)
            buffer.seek(0)
            return buffer
        return model, loop.history

    whole, history = run()
    resumed, resumed_history = run(state=run(interrupted_at=3))
    assert [turn.distance for turn in resumed_history] == [turn.distance for turn in history]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_diverging_l_step_is_reported_and_the_last_good_state_kept(task):
    model = fresh(task, LC(entries=2))
    states = []

    def train(model, step):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        if step.index == 2:
            with torch.no_grad():
                model.get_parameter("0.weight")[0, 3] = float("nan")

    loop = LCLoop(model, train, schedule=SCHEDULE)
    with pytest.raises(DivergenceError, match=r"L step 2 diverged: '0\.weight' is not finite in 1 of 3072 places.*\n.*below 1/mu = 444"):
        loop.run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[2][name]), name
    assert len(loop.history) == 2


def test_counted_ratio_of_lenet300():
    for entries, expected in ((2, 30.5), (4, 15.6), (16, 7.9), (64, 5.3)):
        layers = [nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, 10)]
        model = prepare(nn.Sequential(*layers), torch.zeros(1, 784), LC(entries=entries))
        assert round(counted_ratio(model), 1) == expected


# Bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LC(codebook="log"), "LC: codebook must be one of"),
        (lambda: LC(codebook=(1.0, 1.0)), "must differ in float32"),
        (lambda: LC(codebook=()), "tuple of finite numbers"),
        (lambda: LC(codebook=(1.0, float("inf"))), "tuple of finite numbers"),
        (lambda: LC(codebook=(0.0,), learn_scale=True), "needs an entry that is not zero"),
        (lambda: LC(entries=0), "entries must be a whole number from 1 to 65536, got 0"),
        (lambda: LC(smallest_power=-1), "smallest_power must be a whole number from 0 to 30, got -1"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_more_entries_than_weights():
    with pytest.raises(PreparationError, match=r"weight 'weight' of shape \(2, 3\) has 6 weights, fewer than the 7 entries"):
        prepare(nn.Linear(3, 2), torch.zeros(1, 3), LC(entries=7))


def test_a_constant_weight():
    net = nn.Linear(8, 4)
    nn.init.constant_(net.weight, 0.25)
    for method in KINDS.values():
        model = prepare(net, torch.zeros(1, 8), method)
        lc_step(model, next_mu=0)
        assert torch.isfinite(convert(model)(torch.ones(1, 8))).all()
        if method.codebook == "adaptive":
            assert torch.equal(convert(model).weight_quantized(), net.weight)


@pytest.mark.parametrize("schedule", [[], [0.0, 1.0], [1.0, 0.5]])
def test_schedules_that_cannot_be(schedule):
    model = prepare(nn.Linear(8, 4), torch.zeros(1, 8), LC())
    with pytest.raises(ValueError, match="the schedule must be positive and rising"):
        LCLoop(model, lambda model, step: None, schedule=schedule)


def test_models_without_lc_weights():
    ste = prepare(nn.Linear(8, 4), torch.zeros(1, 8), STE())
    with pytest.raises(PreparationError, match="lc_penalty: no weight of the model is quantized by LC: it was prepared with STE"):
        lc_penalty(ste)
    with pytest.raises(PreparationError, match="LCLoop: the Linear is not prepared"):
        LCLoop(nn.Linear(8, 4), lambda model, step: None)
    mixed = prepare(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(1, 8), {"0": STE(), "1": LC()})
    with pytest.raises(PreparationError, match="the paper counts LC weights alone"):
        counted_ratio(mixed)
    with pytest.raises(ValueError, match="next_mu must not be negative"):
        lc_step(mixed, next_mu=-1)
