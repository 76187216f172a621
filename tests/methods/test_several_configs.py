"""Several DiffQConfigs in one model: what concerns one weight differs, the size is one."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert, model_size, prepare
from diffq_fx.export.packed import load_packed, save_packed
from diffq_fx.methods import STE

IDS = torch.randint(400, (4, 6), generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(400, 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 32)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)))


def embedding_apart(embedding, rest=None, **both):
    return {"embedding": DiffQConfig(**embedding, **both), "*": DiffQConfig(**({"group_size": 8} | (rest or {})), **both)}


MAPPINGS = {
    "groups": embedding_apart(dict(group_size=64)),
    "ranges and grid": embedding_apart(dict(group_size="tensor", grid="symmetric"), dict(range_per="group")),
    "limits": embedding_apart(dict(min_bits=1, max_bits=3, init_bits=2), dict(min_bits=2.5, max_bits=12)),
    "widths": embedding_apart(dict(widths=(2, 4, 8)), dict(widths=(3, 5, 6, 7))),
    "noise and clipping": embedding_apart(dict(noise="gaussian", clip_ranges=False), dict(clip_ranges=True)),
    "entropy": embedding_apart(dict(group_size=64, max_bits=4, init_bits=3), size_of="packed_file"),
    "container": embedding_apart(dict(widths=(2, 4)), dict(group_size="channel"), size_of="onnx_file"),
}


def trained(mapping, steps=30, seed=0):
    torch.manual_seed(seed)
    model = prepare(Words(), IDS, mapping)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(400, (8, 6))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 32).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("frozen", [False, True], ids=["under noise", "final bits"])
@pytest.mark.parametrize("name", MAPPINGS)
def test_the_one_target_is_met_and_every_weight_keeps_to_its_own_settings(name, frozen, tmp_path):
    mapping = {pattern: dataclasses.replace(each, training_steps=200 if frozen else None) for pattern, each in MAPPINGS[name].items()}
    model = trained(mapping)
    compression = model.compression
    assert compression.frozen == frozen
    for quantizer in compression.learned:
        own = mapping["embedding" if quantizer.spec.name.startswith("embedding") else "*"]
        assert quantizer.config == own
        assert (quantizer.spec.group_size, quantizer.spec.range_size, quantizer.spec.grid) == own.layout
    target = 4 * compression.groups().num_weights + compression.rest_bits
    exact = model_size(model, exact=True) * 2**23
    coded = mapping["*"].size_of == "packed_file"
    assert exact == pytest.approx(target, rel=0.02 if coded else 0.01)
    converted = convert(model)
    assert torch.equal(converted(IDS), model.eval()(IDS))
    for weight in bits_report(converted).weights:
        own = mapping["embedding" if weight.name.startswith("embedding") else "*"]
        assert set(weight.histogram) <= set(own.limits.widths)
    save_packed(converted, tmp_path / "m.dfq")
    assert torch.equal(load_packed(Words().eval(), tmp_path / "m.dfq")(IDS), converted(IDS))


@pytest.mark.parametrize("name", ["groups", "limits", "widths"])
def test_the_road_to_onnx(name, tmp_path):
    pytest.importorskip("onnx")
    from diffq_fx.export import export_onnx

    converted = convert(trained(MAPPINGS[name]))
    for layout in ("onnxruntime", "qdq"):
        result = export_onnx(converted, IDS, tmp_path / f"{layout}.onnx", layout=layout)
        assert result.max_abs_error < 1e-4


def test_equal_configs_are_one():
    """Two patterns with the same settings train as one config does."""
    once, twice = trained({"*": DiffQConfig(group_size=8)}), trained(embedding_apart(dict(group_size=8)))
    for name, tensor in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor), name


def test_a_target_that_the_limits_of_all_cannot_reach():
    mapping = embedding_apart(dict(max_bits=3, init_bits=2), dict(max_bits=6, init_bits=5), target_bits=7)
    net = Words()
    before = set(dir(net))
    with pytest.raises(ValueError, match=r"target_bits=7 cannot be reached with widths from 1 to 3 and from 1 to 6 bits"):
        prepare(net, IDS, mapping)
    assert set(dir(net)) == before


def test_a_weight_at_its_limit_leaves_the_rest_of_the_target_to_the_others():
    model = trained(embedding_apart(dict(max_bits=2, init_bits=1.5), dict(max_bits=12), target_bits=6))
    target = 6 * model.compression.groups().num_weights + model.compression.rest_bits
    assert model_size(model, exact=True) * 2**23 == pytest.approx(target, rel=0.01)
    widths = {q.spec.name: q.width.float().mean().item() for q in model.compression.learned}
    assert widths["embedding.weight"] <= 2
    assert widths["head.weight"] > 6


def test_a_copy_and_a_state_dict_go_on_as_the_model_does():
    mapping = MAPPINGS["limits"]
    model = trained(mapping)
    again = prepare(Words(), IDS, mapping)
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other.eval()(IDS), model.eval()(IDS))
        assert model_size(other, exact=True) == model_size(model, exact=True)


def test_beside_another_method():
    mapping = {"head": STE(bits=8), **embedding_apart(dict(group_size=64), target_mib=0.04)}
    model = trained(mapping)
    assert model_size(model, exact=True) == pytest.approx(0.04, rel=0.01)
    assert bits_report(convert(model)).packed_size.total_mib == model_size(model, exact=True)
