"""One model, several threads: no forward writes to a module."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, convert, prepare, prepare_diffq
from diffq_fx.export import export_onnx
from diffq_fx.methods import STE

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(1, 2, 16)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(16, 16, batch_first=True), nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


MODELS = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False),
}


@pytest.fixture
def _switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching")
@pytest.mark.filterwarnings("ignore::diffq_fx.DiffQWarning")
@pytest.mark.parametrize("scope", ["auto", "module"])
@pytest.mark.parametrize("name", MODELS)
def test_eight_threads_read_one_model(name, scope):
    prepared = prepare_diffq(MODELS[name](), X, CONFIG, scope=scope).eval()
    for model in (prepared, convert(prepared)):
        wanted = {key: dict(vars(module)["_parameters"]) for key, module in model.named_modules()}
        with torch.no_grad():
            expected = model(X)

        @torch.no_grad()
        def serve(_, model=model, expected=expected):
            return all(torch.equal(model(X), expected) for _ in range(30))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(serve, range(8)))
        for key, module in model.named_modules():
            assert vars(module)["_parameters"].keys() == wanted[key].keys()
            assert all(each is wanted[key][kept] for kept, each in vars(module)["_parameters"].items()), key


class Watched(dict):
    """A registry that refuses to be written."""

    def __setitem__(self, key, value):
        raise AssertionError(f"a forward wrote {key}")

    __delitem__ = pop = clear = update = __setitem__


@pytest.mark.parametrize("scope", ["auto", "module"])
@pytest.mark.parametrize("name", MODELS)
def test_no_forward_writes_a_parameter(name, scope):
    model = prepare_diffq(MODELS[name](), X, CONFIG, scope=scope)
    for module in model.modules():
        module.__dict__["_parameters"] = Watched(module._parameters)
    for mode in (True, False):
        model.train(mode)(X).sum().backward()


def test_another_thread_sees_the_parameter_while_a_forward_runs():
    """The weights are handed to the forwards of one thread."""
    train = prepare_diffq(MODELS["lstm"](), X, CONFIG, scope="module")
    seen = []

    def look(module, args):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(lambda: train.rnn.weight_hh_l0).result())

    train.out.register_forward_pre_hook(look)
    train(X)
    assert seen[0] is train.rnn.weight_hh_l0
    assert isinstance(seen[0], nn.Parameter)


def test_several_prepare_and_export_while_one_trains(tmp_path, capsys):
    """Nothing of torch's, nor stderr, stays as a trace has it."""
    torch_s_own, stderr = (vars(torch.amp.autocast)["__enter__"], vars(torch.autograd.Function)["apply"]), sys.stderr
    done = threading.Event()

    def train():
        steps = 0
        while not done.wait(0.001):
            with torch.autocast("cpu", torch.bfloat16):
                sys.stderr.write("a step\n")
            steps += 1
        return steps

    def work(number):
        net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        return export_onnx(convert(prepare(net, torch.randn(2, 16), STE(bits=4))), torch.randn(2, 16), tmp_path / f"{number}.onnx")

    with ThreadPoolExecutor(3) as pool:
        other = pool.submit(train)
        try:
            assert len(list(pool.map(work, range(3)))) == 3
        finally:
            done.set()
        steps = other.result()
    assert capsys.readouterr().err.count("a step\n") == steps > 0
    assert (vars(torch.amp.autocast)["__enter__"], vars(torch.autograd.Function)["apply"]) == torch_s_own
    assert sys.stderr is stderr
