"""Bad input: a clear error by its message, and nothing changed."""

import pytest
import torch
from torch import nn

from diffq_fx import ConversionError, DiffQConfig, PreparationError, convert_diffq, prepare_diffq, setup_optimizer
from diffq_fx.errors import DiffQWarning

X = torch.zeros(2, 16)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def refuses(error, match, model, example=X, config=None, **kw):
    """The call fails with the message, and leaves the model as it was."""
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    attributes, training = set(dir(model)), model.training
    with pytest.raises(error, match=match):
        prepare_diffq(model, example, config, **kw)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert set(dir(model)) == attributes
    assert model.training == training


def test_no_quantizable_weight():
    refuses(PreparationError, r"Sequential has no weight to quantize \(0\.weight \(16,\): 1-d", nn.Sequential(nn.BatchNorm1d(16)))


def test_no_parameters_at_all():
    refuses(PreparationError, "it has no parameters", nn.ReLU())


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        prepare_diffq(lambda x: x, X)


def test_exclude_that_matches_nothing():
    refuses(
        ValueError,
        r"exclude pattern 'decoder\.\*' matches no parameter\. The model has 0\.weight",
        net(),
        config=DiffQConfig(exclude=("decoder.*",)),
    )


def test_exclude_is_listed_with_its_reason():
    prepared = prepare_diffq(net(), X, DiffQConfig(exclude=("2",), target_bits=5))
    assert [(s.name, s.reason) for s in prepared.compression.skipped if s.name == "2.weight"] == [("2.weight", "excluded by '2'")]
    assert [q.spec.name for q in prepared.compression.quantizers] == ["0.weight"]


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_weight_that_is_not_finite(value, shown):
    model = net()
    with torch.no_grad():
        model[2].weight[1, 3] = value
    refuses(PreparationError, rf"'2\.weight' of shape \(8, 32\) has 1 non-finite values\n  first at \[1, 3\]: {shown}", model)


def test_constant_weight_works():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(0.25)
        model[2].weight.zero_()
    prepared = prepare_diffq(model, X, DiffQConfig(target_bits=5))
    assert torch.isfinite(prepared(X)).all()
    with pytest.warns(DiffQWarning, match="never moved"):
        converted = convert_diffq(prepared)
    assert torch.equal(converted.get_submodule("0.weight_quantized")(), model[0].weight)
    assert torch.equal(converted(X), model.eval()(X))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(group_size=0), "group_size must be a whole number of at least 1, got 0"),
        (dict(group_size="row"), 'group_size must be "tensor", "channel" or a number'),
        (dict(min_bits=0), "min_bits must be from 1 to 16, got 0"),
        (dict(max_bits=17), "max_bits must be from 1 to 16, got 17"),
        (dict(min_bits=6, init_bits=6), "expected min_bits < init_bits <= max_bits, got 6, 6, 8"),
        (dict(init_bits=9), "expected min_bits < init_bits <= max_bits, got 1, 9, 8"),
        (dict(target_bits=4, penalty=1.0), "give one of target_bits, target_mib and penalty"),
        (dict(target_mib=-1), "target_mib must be positive and finite, got -1"),
        (dict(grid="log"), "grid must be one of"),
        (dict(noise="laplace"), "noise must be one of"),
        (dict(rest_dtype="int8"), "rest_dtype must be one of"),
        (dict(range_per="row"), 'range_per must be "tensor", "channel", "group" or a number, got'),
        (dict(range_per=0), "range_per must be a whole number of at least 1, got 0"),
        (dict(range_per=32.5), "range_per must be a whole number of at least 1, got 32.5"),
        (dict(range_per=1), "range_per=1 would store a range for every weight"),
        (dict(range_per=32, group_size=8), "range_per=32 with group_size=8 would have blocks of two lengths"),
        (dict(scale_dtype="bfloat16"), "scale_dtype must be one of"),
        (dict(scale_dtype="float16", group_size=8), "needs one width in each range, got group_size=8 and range_per='channel'"),
        (dict(scale_dtype="float16", range_per="tensor"), "needs one width in each range, got group_size='channel' and range_per='tensor'"),
        (dict(scale_dtype="float16", size_of="packed_file"), "whose ranges are scaled"),
        (dict(scale_dtype="float16", size_of="packed_file", group_size=32, range_per="group"), "whose ranges are scaled"),
        (dict(grid="float", size_of="packed_file"), 'use "affine" or "symmetric"'),
        (dict(range_per="group", group_size=1), "would store a range for every weight"),
        (dict(training_steps=0), "training_steps must be a whole number of at least 1, got 0"),
        (dict(size_of="onnx_file", widths=(3, 4)), r"size_of=\"onnx_file\" has widths of \(2, 4, 8, 16\) alone, got \(3, 4\)"),
        (dict(size_of="zip"), "size_of must be one of"),
        (dict(widths=(4,)), r"widths must be two or more, rising, got \(4,\)"),
        (dict(widths=(4, 2, 8)), "widths must be two or more, rising"),
        (dict(widths=(2, 4, 16)), "widths must lie within min_bits=1 and max_bits=8"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        DiffQConfig(**settings)


def test_exclude_as_a_string():
    with pytest.raises(TypeError, match="exclude is a tuple of patterns .*, got 'head'"):
        DiffQConfig(exclude="head")


@pytest.mark.parametrize(
    "example",
    [(X, X), torch.zeros(2, 17), torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, device="meta"), dict(y=X)],
    ids=["arity", "shape", "dtype", "device", "name"],
)
def test_example_that_does_not_run(example):
    refuses(ValueError, r"the model does not run on example_inputs \(.*2, 1[67].*\)", net(), example)


def test_prepared_already():
    prepared = prepare_diffq(net(), X, DiffQConfig(target_bits=5))
    refuses(PreparationError, "is prepared already", prepared)


def test_prepare_of_a_converted_model():
    prepared = prepare_diffq(net(), X, DiffQConfig(target_bits=5))
    with pytest.warns(DiffQWarning, match="never moved"):
        converted = convert_diffq(prepared)
    refuses(PreparationError, "is converted: its weights are integers", converted)
    with pytest.raises(ConversionError, match="is converted already"):
        convert_diffq(converted)


def test_convert_of_a_model_never_prepared():
    with pytest.raises(ConversionError, match="Sequential was never prepared. Call prepare_diffq"):
        convert_diffq(net())


def test_target_below_what_min_bits_reaches():
    refuses(
        ValueError,
        r"target_bits=1\.5 cannot be reached with widths from 1 to 8 bits: the 768 weights take from 2\.792 to 10\.16 bits a weight",
        net(),
        config=DiffQConfig(target_bits=1.5),
    )
    refuses(ValueError, r"target_mib=1e-05 cannot be reached.* MiB", net(), config=DiffQConfig(target_mib=1e-5))
    tables = nn.Sequential(nn.Embedding(4096, 64, sparse=True), nn.Linear(64, 8))
    message = r"the 512 weights take from \S+ to \S+ MiB, .* 1 MiB for the rest \(the largest is 0.weight \(4096, 64\): .* with sparse=False it is"
    with pytest.raises(ValueError, match=message):
        prepare_diffq(tables, torch.zeros(2, 3, dtype=torch.int64), DiffQConfig(target_mib=0.1))


def test_target_above_what_max_bits_and_float_take():
    refuses(ValueError, r"target_bits=32 cannot be reached", net(), config=DiffQConfig(target_bits=32))
    refuses(ValueError, r"target_mib=5 cannot be reached", net(), config=DiffQConfig(target_mib=5))


def test_unknown_scope():
    refuses(ValueError, 'scope must be "auto", "model" or "module", got \'graph\'', net(), scope="graph")


def test_attribute_in_the_way():
    model = net()
    model.compression = "mine"
    refuses(PreparationError, "an attribute 'compression' of its own", model)


def test_setup_optimizer_without_the_model():
    prepared = prepare_diffq(net(), X, DiffQConfig(target_bits=5))
    other = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the SGD holds no parameter of this model"):
        setup_optimizer(other, prepared)
    assert len(other.param_groups) == 1
    mine = torch.optim.SGD(prepared.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"bits_lr must be positive, got 0"):
        setup_optimizer(mine, prepared, bits_lr=0)
    with pytest.raises(PreparationError, match="setup_optimizer: the Sequential is not prepared"):
        setup_optimizer(mine, net())


def test_setup_optimizer_moves_the_bits_once():
    prepared = prepare_diffq(net(), X, DiffQConfig(target_bits=5))
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=0.1, weight_decay=0.5)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    for rate in (1e-3, 2e-3):
        setup_optimizer(optimizer, prepared, bits_lr=rate)
        own = optimizer.param_groups[-1]
        assert (own["lr"], own["weight_decay"], len(own["params"])) == (rate, 0.0, 2)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == count


def test_setup_optimizer_keeps_the_names_of_the_parameters():
    prepared = prepare_diffq(net(), X, DiffQConfig(target_bits=5))
    optimizer = setup_optimizer(torch.optim.AdamW(prepared.named_parameters()), prepared)
    named = dict(prepared.named_parameters())
    for group in optimizer.param_groups:
        assert all(named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert optimizer.param_groups[1]["param_names"] == ["0.weight_quantizer.logits", "2.weight_quantizer.logits"]


def test_lazy_and_meta_weights():
    refuses(PreparationError, "on the meta device", nn.Linear(4, 4, device="meta"), torch.zeros(1, 4))
    refuses(PreparationError, "not initialized yet: run the model once", nn.LazyLinear(4), torch.zeros(1, 4))
