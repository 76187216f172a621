"""The tests of this folder look at forms and not at speed: the profiles of real processors must not decide which forms they get."""

import os

import pytest

from diffq_fx.export.onnx.layout import profiles
from diffq_fx.export.onnx.layout.cost import Cost, Profile

QUICK = Profile(
    name="quick",
    source="made by hand: integers win in layers of some size",
    margin=1.1,
    costs={
        "float": Cost(6.0, 0.05, 0.1, 0.01, 0.3, 10.0),
        "fused 2": Cost(6.0, 0.0, 0.01, 0.4, 4.5, 0.2, 0.8, 830.0),
        "fused 4": Cost(6.5, 0.0, 0.02, 0.4, 2.3, 7.0, 0.4, 120.0),
        "fused 8": Cost(6.0, 0.01, 0.03, 0.4, 1.7, 6.0, 0.5, 110.0),
        "dynamic int8": Cost(7.5, 0.004, 0.03, 0.3, 0.3, 1.1, 5.2),
        "dynamic uint8": Cost(7.5, 0.004, 0.03, 0.3, 0.3, 1.2, 5.2),
    },
)


@pytest.fixture(autouse=True, scope="module")
def _integers_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(profiles.KINDS, "portable", (QUICK,))
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.fixture
def old_file(path):
    path.write_bytes(b"the old file")
    yield path
    assert path.read_bytes() == b"the old file"
    assert os.listdir(path.parent) == [path.name]
