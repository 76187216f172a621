"""Any settings at all: refused in a sentence before anything is changed, or a training whose size is met and whose result leaves as a file."""

import copy
import dataclasses
import warnings
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from diffq_fx import DiffQConfig, DiffQWarning, convert, model_size, prepare
from diffq_fx.errors import PreparationError
from diffq_fx.export import load_packed, save_packed
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise
from diffq_fx.methods.learning_compression import CodebookKind

ODD = st.sampled_from([0, -1, 1e9, float("nan"), float("inf"), True, "four", None, (3,), [[]], torch.ones(2)])
SHARED = {
    "exclude": st.sampled_from([("0.*",), ["3.weight"], ("nothing.like.it",)]),
    "min_size": st.sampled_from([0, 105, 10**6]),
    "rest_dtype": st.sampled_from(["float32", "float16"]),
}
FIXED = {"bits": st.integers(1, 16), "group_size": st.sampled_from(["tensor", "channel", 2, 3, 8, 1000]), **SHARED}
SETTINGS = {
    DiffQConfig: {
        "target_bits": st.floats(0.3, 17),
        "target_mib": st.floats(1e-4, 0.02),
        "penalty": st.floats(1e-6, 1e6),
        "size_of": st.sampled_from(["widths", "onnx_file", "packed_file"]),
        "group_size": st.sampled_from(["tensor", "channel", 1, 3, 8, 1000]),
        "range_per": st.sampled_from(["tensor", "channel", "group", 4, 32]),
        "scale_dtype": st.sampled_from(["float32", "float16"]),
        "same_width": st.sampled_from([None, "same_input", (("0", "3"),)]),
        "runtime": st.sampled_from([None, None, None, "gguf", "openvino", "ort-format"]),
        "clip_ranges": st.booleans(),
        "grid": st.sampled_from(["half", "affine", "symmetric", "float"]),
        "noise": st.sampled_from(["uniform", "gaussian"]),
        "min_bits": st.floats(1, 9),
        "max_bits": st.floats(2, 16),
        "widths": st.lists(st.integers(1, 16), min_size=1, max_size=4).map(lambda each: tuple(sorted(each))),
        "init_bits": st.floats(1, 16),
        "training_steps": st.integers(1, 4),
        **SHARED,
    },
    STE: {
        "grid": st.sampled_from(["half", "affine", "symmetric", "float"]),
        "scale_dtype": st.sampled_from(["float32", "float16"]),
        **FIXED,
    },
    LSQ: {"start": st.sampled_from(["least_error", "mean"]), "learned": st.sampled_from(["logarithm", "step"]), **FIXED},
    QuantNoise: {
        "rate": st.floats(0, 1),
        "block_size": st.integers(1, 9),
        "range": st.sampled_from(["minmax", "least_error"]),
        "range_every": st.integers(1, 3),
        "grid": st.sampled_from(["affine", "symmetric"]),
        **FIXED,
    },
    ProductQuantization: {
        "entries": st.sampled_from([1, 2, 5, 12, 13, 256]),
        "block_size": st.one_of(st.just("auto"), st.integers(1, 30)),
        "noise": st.sampled_from(["exact", "mean", "proxy"]),
        "rate": st.floats(0, 1),
        "update_every": st.integers(1, 3),
        "entry_dtype": st.sampled_from(["float32", "float16", "int8"]),
        "iterations": st.integers(1, 5),
        **SHARED,
    },
    LC: {
        "codebook": st.sampled_from([*get_args(CodebookKind), (-1.0, 0.5, 1.0), (0.0,), [0.1, -0.1]]),
        "entries": st.integers(1, 300),
        "smallest_power": st.integers(0, 30),
        "learn_scale": st.booleans(),
        "shared": st.booleans(),
        **SHARED,
    },
}


def some_of(method):
    """A few settings at a time: of many at once hardly any suit each other, and all that is seen is a refusal."""
    own = SETTINGS[method]
    return st.lists(st.sampled_from([*own]), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: st.one_of(*[own[name]] * 30, ODD) for name in names})
    )


def net():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))


X = torch.linspace(-1, 1, 64).reshape(2, 2, 4, 4)


@pytest.mark.parametrize("method", SETTINGS)
def test_every_setting_is_among_them(method):
    assert SETTINGS[method].keys() == {field.name for field in dataclasses.fields(method)}


@pytest.mark.parametrize("method", SETTINGS)
def test_any_settings(tmp_path_factory, method):
    @settings(deadline=None, max_examples=30 if method is DiffQConfig else 10, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(given_settings=some_of(method))
    def whole(given_settings):
        if method is DiffQConfig and not {"target_bits", "target_mib", "penalty"} & given_settings.keys():
            given_settings = {"target_bits": 7.5, **given_settings}  # such small layers have no room for the default
        if method is ProductQuantization:
            given_settings = {"entries": 4, "block_size": 3, **given_settings}
        event(f"a file: {refused_or_whole(method, given_settings, tmp_path_factory.mktemp('any'))}")  # --hypothesis-show-statistics

    whole()


FOUND = {
    "float grid in a packed file": {
        "target_bits": 5.95,
        "size_of": "packed_file",
        "grid": "float",
        "noise": "gaussian",
        "clip_ranges": False,
    },
    "a width over several ranges of a row": {"target_bits": 12.4, "range_per": 4, "training_steps": 1},
    "a type of no number": {"max_bits": "four"},
    "MiB of a small packed file": {
        "target_mib": 0.0014014,
        "size_of": "packed_file",
        "training_steps": 2,
        "clip_ranges": False,
        "init_bits": 6.5,
    },
}


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_settings_that_were_found(found, tmp_path):
    refused_or_whole(DiffQConfig, found, tmp_path)


def refused_or_whole(method, given_settings, folder):
    torch.manual_seed(0)
    model = net()
    before = copy.deepcopy(model.state_dict())
    try:
        config = method(**given_settings)
    except (ValueError, TypeError) as error:
        refused = error
    else:
        refused = None
    if refused:
        assert str(refused).startswith(f"{method.__name__}: ")
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffQWarning)
        try:
            prepared = prepare(model, X, config)
        except (PreparationError, ValueError):
            prepared = None
        if prepared is None:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            return False
        optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            prepared(X).square().mean().backward()
            assert all(each.grad is None or each.grad.isfinite().all() for each in prepared.parameters())
            optimizer.step()
        prepared.eval()
        wanted, size, compression = prepared(X), model_size(prepared, exact=True), prepared.compression
        if compression.learned:
            assert set(compression.width_T().tolist()) <= set(config.limits.widths)
            if config.target_bits is not None:
                assert size * 2**23 - compression.rest_bits_now() <= config.target_bits * compression.groups().num_weights + 1e-6
            if config.target_mib is not None:
                assert size <= config.target_mib
        converted = convert(prepared).eval()
    if config.rest_dtype == "float16":  # what is not quantized is rounded by convert
        torch.testing.assert_close(converted(X), wanted, atol=2e-3, rtol=0)
        wanted = converted(X)
    assert torch.equal(converted(X), wanted)
    loaded = net()
    load_packed(loaded, save_packed(converted, folder / "m"))
    torch.testing.assert_close(loaded(X), wanted)
    return True
