"""DeiT-B has the sizes of the paper's table."""

import pytest
import torch

from diffq_fx import model_size, prepare
from diffq_fx.methods import STE
from recipes.common.loop import float_mib
from recipes.models.imagenet import make_model

pytest.importorskip("transformers")


def test_deit_in_float_has_the_size_of_the_papers_table():
    with torch.device("meta"):
        assert float_mib(make_model("deit_b", 1000)) == pytest.approx(330.2, abs=0.05)


@pytest.mark.slow
def test_deit_at_four_bits_has_the_size_of_the_papers_table():
    with torch.device("meta"):
        empty = make_model("deit_b", 1000)
    model = empty.to_empty(device="cpu")
    for each in [*model.parameters(), *model.buffers()]:
        each.detach().copy_(torch.linspace(-1, 1, each.numel()).view_as(each))
    pictures = torch.zeros(1, 3, 224, 224)
    prepared = prepare(model, (pictures,), STE(bits=4, group_size="tensor", grid="float", min_size=26215))
    assert model_size(prepared, exact=True) == pytest.approx(41.7, abs=0.05)
