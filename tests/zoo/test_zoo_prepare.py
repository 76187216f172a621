"""Prepare every model of the zoo: the scope, the quantizers, the same result with the noise off, and an original that is as it was."""

import copy
import re

import pytest
import torch
from torch import nn

from diffq_fx import CaptureError, DiffQConfig, DiffQWarning, PreparationError, WeightQuantizer, prepare, prepare_diffq
from zoo.checks import MODES, assert_same, assert_unchanged, converted, noise_off, prepared, run, snapshot
from zoo.entry import Entry, each_in_one_way, parameters_of, randn
from zoo.models import BY_NAME, ZOO

every_model = pytest.mark.parametrize("entry", parameters_of(ZOO))


@every_model
def test_takes_the_expected_scope_and_every_weight(entry: Entry):
    model = prepared(entry)
    compression = model.compression
    assert compression.scope == entry.scope, compression.scope_reason
    assert re.search(entry.untraceable, compression.scope_reason)
    assert bool(compression.scope_reason) == (entry.scope == "module")
    assert len(compression.quantizers) == entry.weights
    matrices = {id(p): name for name, p in entry.make().named_parameters() if p.ndim >= 2}
    quantized = {q.spec.name for q in compression.quantizers}
    assert set(matrices.values()) - quantized == set(entry.skipped)
    assert {s.name for s in compression.skipped if len(s.shape) >= 2} == set(entry.skipped)
    if entry.scope == "model":
        called = [node.target for node in model.graph.nodes if str(node.target).endswith("_quantizer")]
        assert len(called) == entry.weights, "each weight has one node, and so one draw a forward"
    assert all(
        isinstance(model.get_submodule(name + "_quantizer"), WeightQuantizer) for q in compression.quantizers for name in q.spec.names
    )


@every_model
@pytest.mark.parametrize("scope", ["auto", "module"])
def test_computes_the_same_with_the_noise_off(entry: Entry, scope: str):
    """In every mode, on the example and on inputs of another size, in the same containers, and with the same effect on the buffers."""
    if scope == "module" and entry.scope == "module":
        pytest.skip("the same as auto")
    if scope == "module" and entry.name == "weights_in_a_list":
        pytest.skip("refused: no weight that is handed reaches a list of the user's")
    original, model = entry.make(), prepared(entry, scope=scope)
    assert scope == "auto" or model.compression.scope == "module"
    with noise_off(model):
        for variant in (0, 1):
            for mode in MODES:
                assert_same(run(model, entry, mode, variant), run(original, entry, mode, variant))
    after = model.state_dict()
    assert original.state_dict().keys() <= after.keys()
    for name, buffer in original.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize(
    ("entry", "way"),
    each_in_one_way(parameters_of(ZOO), ("train", "eval")),
)
def test_leaves_the_original_as_it_was(entry: Entry, way: str):
    training = way == "train"
    original, twin = entry.make().train(training), entry.make().train(training)
    before, random_state = snapshot(original), torch.get_rng_state()
    model = prepared(entry, original)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_unchanged(before, snapshot(original))
    assert all(
        p is dict(model.named_parameters(remove_duplicate=False))[name] for name, p in original.named_parameters(remove_duplicate=False)
    )
    assert not {b.data_ptr() for b in model.buffers() if b.numel()} & {b.data_ptr() for b in original.buffers() if b.numel()}
    for name, module in original.named_modules():
        assert model.get_submodule(name).training == module.training
    assert all(module.training == training for module in model.modules())
    for mode in MODES:
        assert_same(run(original, entry, mode), run(twin, entry, mode))


@pytest.mark.parametrize("entry", parameters_of([entry for entry in ZOO if entry.unseen]))
def test_warns_of_weights_that_the_example_never_reads(entry: Entry):
    args, kwargs = entry.example()
    with pytest.warns(DiffQWarning, match=f"never read {', '.join(entry.unseen)}") as warned:
        prepare(entry.make(), kwargs or args, DiffQConfig(penalty=1.0))
    assert warned[0].filename == __file__


@pytest.mark.parametrize("entry", parameters_of([entry for entry in ZOO if entry.scope == "module"]))
def test_refuses_model_scope_where_it_would_not_be_faithful(entry: Entry):
    """Where the reason is one of several protections, this shows that it is the one that holds."""
    with pytest.raises(CaptureError, match=entry.untraceable):
        prepared(entry, scope="model")


@pytest.mark.parametrize("scope", ["model", "module"])
def test_keeps_the_mode_of_every_module(scope: str):
    """A frozen batch norm stays frozen."""
    entry = BY_NAME["resnet18"]
    original = entry.make().train()
    frozen = [name for name, module in original.named_modules() if isinstance(module, nn.BatchNorm2d)][::2]
    for name in frozen:
        original.get_submodule(name).eval()
    model = prepared(entry, original, scope=scope)
    for name, module in original.named_modules():
        assert model.get_submodule(name).training == module.training == (name not in frozen)
    assert all(quantizer.training for quantizer in model.compression.quantizers)


def test_a_default_that_the_example_replaced_is_gone():
    """The graph was traced with a scale, so a call without one must fail, not compute something else."""
    entry = BY_NAME["optional_scale"]
    model = prepared(entry)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'scale'"):
        model(entry.example()[0][0])


def test_a_model_that_keeps_results_of_its_last_forward():
    """Torch does not copy tensors with a history; a model that holds some can be prepared and converted all the same."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            self.kept = [self.linear(x)]
            return self.kept[0] * 2

    original, x = Keeps(), randn(2, 8)
    original(x)
    kept = original.kept[0]
    model = prepare_diffq(original, x, DiffQConfig(penalty=1.0))
    assert original.kept[0] is kept
    model(x).sum().backward()
    result = converted(model)
    assert torch.equal(result(x), model.eval()(x))


@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_sparse_buffer(scope: str):
    """The adjacency matrix of a graph convolution: few operations of torch take it."""

    class GraphConvolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("adjacency", (torch.eye(6) + torch.eye(6).roll(1, 0)).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.adjacency, self.linear(x))

    original, x = GraphConvolution(), randn(6, 8)
    model = prepare_diffq(original, x, DiffQConfig(penalty=1.0), scope=scope)
    model(x).sum().backward()
    with noise_off(model):
        assert torch.equal(model(x), original(x))
    result = converted(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(result)(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_weight_made_in_a_hook_is_refused(kind: str):
    model = nn.Sequential(nn.ReLU(), getattr(nn.utils, kind)(nn.Linear(8, 8)))
    with pytest.raises(PreparationError, match=rf"1 makes its weight in a hook of torch.nn.utils.{kind}"):
        prepare_diffq(model, randn(2, 8))
