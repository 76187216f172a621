"""Take each protection away, or trick it: an error or a warning comes from the next one, never a model that bypasses its noise."""

import functools
import importlib
import re
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx import CaptureError, DiffQConfig, DiffQWarning, PassError, prepare, prepare_diffq
from diffq_fx.capture import gate, readers, trace, whole_graph
from diffq_fx.capture.copies import copy_sharing_parameters
from diffq_fx.example import Example
from diffq_fx.methods.diffq import DiffQWeight
from diffq_fx.passes.quantizer_nodes import insert_quantizers
from zoo.checks import noise_off, prepared, run, tensors_in
from zoo.control_flow import Point, Result, Two
from zoo.entry import Entry, randn
from zoo.models import BY_NAME

PREPARE = importlib.import_module("diffq_fx.prepare")  # the package's attribute of that name is the function
CONFIG = DiffQConfig(penalty=1.0)
X = randn(3, 8)

SEVERAL = [
    "resnet20_cifar",
    "lstm_lm",
    "mha",
    "transformer_encoder",
    "tied",
    "reads_its_child",
    "bare_parameters",
    "embedding_bag",
    "unet2d",
    "weight_norm",
]


# A weight that capture overlooks


@pytest.mark.parametrize(
    "name",
    [
        *SEVERAL,
        pytest.param("bert", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("which", [0, -1])
def test_a_consumer_that_is_missed(name: str, which: int, monkeypatch: pytest.MonkeyPatch):
    """One weight of one consumer is not found: the gate sees the NaN come through."""
    find = readers.find_readers

    def miss_one(*args: Any) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        found, unseen = find(*args)
        path = list(found)[which]
        found[path] = found[path][:-1]
        return {path: names for path, names in found.items() if names}, unseen

    monkeypatch.setattr(PREPARE, "find_readers", miss_one)
    with pytest.raises(CaptureError, match="values of the output.* differ, by up to inf"):
        prepared(BY_NAME[name], scope="module")


def test_the_fast_path_of_transformer_layers_if_it_were_not_known(monkeypatch: pytest.MonkeyPatch):
    """The probe switches the fast path off and so cannot see who reads there; the gate has no hook and can."""
    monkeypatch.setattr(readers, "_READS_ITS_CHILDREN", (nn.MultiheadAttention,))
    with pytest.raises(CaptureError, match="in eval without grad: .* differ, by up to inf"):
        prepared(BY_NAME["transformer_encoder"], scope="module")


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("which", [0, -1])
def test_a_weight_whose_quantizer_is_not_inserted(name: str, which: int, monkeypatch: pytest.MonkeyPatch):
    """verify_prepared refuses the graph; without verify_prepared, the gate does, and no graph at all is right by itself."""
    monkeypatch.setattr(PREPARE, "insert_quantizers", functools.partial(_insert_all_but, which=which))
    with pytest.raises(PassError, match="expected one reader, its quantizer"):
        prepared(BY_NAME[name])
    monkeypatch.setattr(PREPARE, "verify_prepared", lambda gm: PassResult(gm, False))
    with pytest.raises(CaptureError, match="differ, by up to inf"):
        prepared(BY_NAME[name], scope="model")
    assert prepared(BY_NAME[name]).compression.scope == "module"


def _insert_all_but(gm: fx.GraphModule, which: int) -> PassResult:
    result = insert_quantizers(gm)
    node = [node for node in gm.graph.nodes if "quantizer" in str(node.target)][which]
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)
    return result


def test_a_weight_that_a_list_of_the_users_hides():
    """What is handed to a forward does not reach the list; that the weights themselves are unreadable does."""
    with pytest.raises(CaptureError, match="differ, by up to inf"):
        prepared(BY_NAME["weights_in_a_list"], scope="module")


# A result that changes


@pytest.mark.parametrize("name", SEVERAL)
def test_a_quantizer_node_that_changes_the_weight_a_little(name: str, monkeypatch: pytest.MonkeyPatch):
    """By one part in 2^20: noise off must be bitwise."""
    monkeypatch.setattr(DiffQWeight, "forward", lambda self, weight: self._stand_in() * (1 + 2**-20))
    with pytest.raises(CaptureError, match="with noise off"):
        prepared(BY_NAME[name])


@pytest.mark.parametrize("name", ["tests_its_mode", "functional_dropout"])
def test_a_mode_that_is_baked_in(name: str, monkeypatch: pytest.MonkeyPatch):
    """If only eval mode were traced, the gate's run in train mode would tell."""
    monkeypatch.setattr(whole_graph, "trace_in_both_modes", _trace_eval_only)
    with pytest.raises(CaptureError, match="in train: .* values of the output differ"):
        prepared(BY_NAME[name], scope="model")


def _trace_eval_only(model: nn.Module, selection: Any, reads: Any) -> tuple[fx.Graph, fx.Tracer]:
    tracer = trace._WeightTracer(selection, reads)
    graph, _ = trace._traced(reads.watch(copy_sharing_parameters(model).eval()), tracer, nullcontext)
    return graph, tracer


def test_a_state_that_is_baked_in(monkeypatch: pytest.MonkeyPatch):
    """If tracing did not look at the module's state, the next trace would refuse the node that the last one left there."""

    class Counts(Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.second(self.first(x))

    with pytest.raises(CaptureError, match="changes calls of the module"):
        prepare_diffq(Counts(), X, CONFIG, scope="model")
    monkeypatch.setattr(trace, "_changes", lambda *_: [])
    with pytest.raises(CaptureError, match="the Counts cannot be captured faithfully"):
        prepare_diffq(Counts(), X, CONFIG, scope="model")


def test_an_attribute_set_on_a_tensor():
    """Only Python sees ``x.requires_grad = True``; a graph does not hold it."""

    class Sets(Two):
        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad = True
            return self.second(self.first(x))

    with pytest.raises(CaptureError, match="sets the attribute 'requires_grad' of a tensor"):
        prepare_diffq(Sets(), X, CONFIG, scope="model")
    assert prepare_diffq(Sets(), X, CONFIG).compression.scope == "module"


def test_a_model_that_gives_another_result_each_time():
    class Clock(Two):
        ticks = iter(range(1000))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + next(self.ticks)

    with pytest.raises(CaptureError, match="the original model itself gives another result when it runs again from the same seed"):
        prepare_diffq(Clock(), X, CONFIG)


def test_the_user_is_not_left_with_poisoned_weights():
    """Whatever happens in the gate, the weights come back: they are the original's too."""

    class FailsTheFourthTime(Two):
        calls: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            if len(self.calls) > 6:
                raise KeyboardInterrupt
            return self.second(self.first(x))

    model = FailsTheFourthTime()
    with pytest.raises(KeyboardInterrupt):
        prepare_diffq(model, X, CONFIG, scope="module")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# The gate's own eyes


class Opaque:
    def __init__(self, *held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    ("found", "expected", "says"),
    [
        (torch.nextafter(X, X + 1), X, r"24 of 24 values of the output differ, by up to \S*e-0[78]"),
        (torch.where(X > 0, X, torch.nan), X, "by up to inf"),
        (X.double(), X, r"is torch.float64 \(3, 8\), the original's torch.float32"),
        (X[:2], X, r"is torch.float32 \(2, 8\)"),
        ({"a": X}, [X], "the output is a dict, the original's a list"),
        ({"a": X}, {"b": X}, r"the output holds \['a'\], the original's \['b'\]"),
        ([X, X], [X, X, X], r"the output holds \[0, 1\]"),
        ((X, X), Point(X, X), "the output is a tuple, the original's a Point"),
        (Result(X, X + 1), Result(X, X), r"values of the output\['hidden'\] differ"),
        (Opaque(X, [X + 1]), Opaque(X, [X]), r"values of the output\['held'\]\[1\]\[0\] differ"),
        ({"a": 1}, {"a": 2}, r"the output\['a'\] is 1, the original's 2"),
        ((X, None), (X, X), r"the output\[1\] is a NoneType, the original's a Tensor"),
    ],
)
def test_the_gate_sees_a_difference(found: Any, expected: Any, says: str):
    assert re.search(says, gate._difference(found, expected, "the output"))
    assert gate._difference(expected, found, "the output")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_the_gate_looks_into_sparse_tensors(layout: str):
    matrix = torch.eye(4)
    sparse, other, wider = (getattr(each, layout)() for each in (matrix, matrix * (1 + 2**-20), matrix + matrix.roll(1, 0)))
    assert gate._difference(sparse, getattr(matrix, layout)(), "the output") == ""
    assert "4 of 4 values of the output differ" in gate._difference(sparse, other, "the output")
    assert gate._difference(sparse, wider, "the output")
    assert "is torch.sparse" in gate._difference(sparse, matrix, "the output")


def test_the_gate_sees_equal_results_as_equal():
    nan = torch.full((2,), torch.nan)
    ring: list[Any] = [X]
    ring.append(ring)
    other: list[Any] = [X.clone()]
    other.append(other)
    for a, b in ((X, X.clone()), (nan, nan.clone()), (float("nan"), float("nan")), (Result(X, X), Result(X, X.clone())), (ring, other)):
        assert gate._difference(a, b, "the output") == ""


# Weights that the example does not reach


class ReadsItInARareBranch(nn.Module):
    """The parent reads its child's weight, but only for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.child = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.always(x)
        return F.linear(out, self.child.weight) if x.abs().max() > 100 else out


def test_an_unseen_weight_is_named_in_a_warning():
    with pytest.warns(DiffQWarning, match=r"the example never read child\.weight; .* give an example that does"):
        model = prepare_diffq(ReadsItInARareBranch(), X, CONFIG)
    assert "child.weight" in " ".join(model.compression.notes)


def test_with_an_example_that_reads_it_the_parent_is_the_consumer():
    """As the warning advises: then the read in the branch goes through the noise."""
    model = prepare_diffq(ReadsItInARareBranch(), X * 1000, CONFIG)
    quantizer = model.get_submodule("child.weight_quantizer")
    with noise_off(model):
        quantizer.pass_through(lambda: torch.full((8, 8), torch.nan))
        assert bool(model(X * 1000).isnan().all())
        assert not bool(model(X).isnan().any())


def test_a_model_that_reads_none_of_its_weights():
    class Idle(Two):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with pytest.warns(DiffQWarning, match=r"never read first\.weight, second\.weight"):
        prepare_diffq(Idle(), X, CONFIG)


# What a check must not cost


@pytest.mark.parametrize("name", ["resnet20_cifar", "stateful", "writes_input", "moving_average", "lstm_lm"])
def test_checking_leaves_no_trace_on_the_prepared_model(name: str):
    """The prepared model has not counted, averaged or kept anything of the example."""
    entry: Entry = BY_NAME[name]
    original = entry.make()
    model = prepared(entry, original)
    for key, buffer in original.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    for path, module in original.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | list | None)}
        mine = model.get_submodule(path)
        assert {key: getattr(mine, key) for key in plain} == plain
    assert not hasattr(model, "last")


def test_the_example_is_not_changed():
    x = X.clone()
    prepare(BY_NAME["adds_to_its_input"].make(), Example.of(x), CONFIG)
    assert torch.equal(x, X)


def test_noise_off_is_really_off_and_on_is_on():
    """So that a comparison with the noise off compares something."""
    entry = BY_NAME["resnet20_cifar"]
    model = prepared(entry)
    expected = tensors_in(run(entry.make(), entry, "train"))[0]
    assert not torch.equal(tensors_in(run(model, entry, "train"))[0], expected)
