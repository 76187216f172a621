"""Prepare every model of the zoo: the scope, the quantizers, the same result with the noise off, and an original that is as it was."""

import pytest
import torch

from diffq_fx import DiffQConfig, DiffQWarning, WeightQuantizer, prepare_diffq
from zoo.checks import MODES, assert_same, assert_unchanged, noise_off, prepared, run, snapshot
from zoo.entry import Entry, parameters_of
from zoo.models import ZOO

every_model = pytest.mark.parametrize("entry", parameters_of(ZOO))


@every_model
def test_takes_the_expected_scope_and_every_weight(entry: Entry):
    model = prepared(entry)
    compression = model.compression
    assert compression.scope == entry.scope, compression.scope_reason
    assert bool(compression.scope_reason) == (entry.scope == "module")
    assert len(compression.quantizers) == entry.weights
    matrices = {id(p): name for name, p in entry.make().named_parameters() if p.ndim >= 2}
    quantized = {q.spec.name for q in compression.quantizers}
    assert set(matrices.values()) - quantized == set(entry.skipped)
    assert {s.name for s in compression.skipped if len(s.shape) >= 2} == set(entry.skipped)
    assert all(isinstance(model.get_submodule(name + "_quantizer"), WeightQuantizer) for q in compression.quantizers for name in q.spec.names)


@every_model
@pytest.mark.parametrize("scope", ["auto", "module"])
def test_computes_the_same_with_the_noise_off(entry: Entry, scope: str):
    """In every mode, on the example and on inputs of another size, in the same containers, and with the same effect on the buffers."""
    if scope == "module" and entry.scope == "module":
        pytest.skip("the same as auto")
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


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_original_as_it_was(entry: Entry, training: bool):
    original, twin = entry.make().train(training), entry.make().train(training)
    before, random_state = snapshot(original), torch.get_rng_state()
    model = prepared(entry, original)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_unchanged(before, snapshot(original))
    assert all(p is dict(model.named_parameters(remove_duplicate=False))[name] for name, p in original.named_parameters(remove_duplicate=False))
    assert not {b.data_ptr() for b in model.buffers() if b.numel()} & {b.data_ptr() for b in original.buffers() if b.numel()}
    for name, module in original.named_modules():
        assert model.get_submodule(name).training == module.training
    assert all(module.training == training for module in model.modules())
    for mode in MODES:
        assert_same(run(original, entry, mode), run(twin, entry, mode))


@pytest.mark.parametrize("entry", parameters_of([entry for entry in ZOO if entry.unseen]))
def test_warns_of_weights_that_the_example_never_reads(entry: Entry):
    args, kwargs = entry.example()
    with pytest.warns(DiffQWarning, match=f"never read {', '.join(entry.unseen)}"):
        prepare_diffq(entry.make(), kwargs or args, DiffQConfig(penalty=1.0))
