"""Every pass does its job, leaves a non-matching graph alone, keeps the numerics, and does nothing the second time."""

from functools import partial

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from diffq_fx.capture.whole_graph import capture_model
from diffq_fx.errors import PassError
from diffq_fx.example import Example
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.mapping import MethodChoice
from diffq_fx.passes.annotate_weights import META_KEY, annotate_weights, completed
from diffq_fx.passes.quantizer_nodes import insert_quantizers, replace_quantizers, verify_converted, verify_prepared
from diffq_fx.passes.runner import run_passes
from diffq_fx.selection import select_weights
from diffq_fx.weights import WeightSpec, owner_of

CONFIG = DiffQConfig(target_bits=None)
X = torch.randn(3, 6)


class Model(nn.Module):
    """A Linear used twice, a bare weight on the right of a product, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.right = nn.Parameter(torch.randn(6, 10))
        self.up = nn.ConvTranspose1d(10, 4, 3)

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(x))) @ self.right
        return self.up(x.unsqueeze(2))


class NoWeight(nn.Module):
    def forward(self, x):
        return torch.relu(x) + 1


def captured():
    model = Model()
    plan = select_weights(model, MethodChoice.of(CONFIG, "test"), "test")
    return model, plan, capture_model(model, Example.of(X), plan)


def annotated():
    model, plan, gm = captured()
    annotate_weights(gm, plan)
    return model, plan, gm


def prepared():
    model, plan, gm = annotated()
    for key, spec in plan.specs.items():
        owner, attribute = owner_of(gm, spec.name)
        owner.add_module(attribute + "_quantizer", CONFIG.make_quantizer(spec, plan.parameters[key]))
    run_passes(gm, [insert_quantizers, verify_prepared])
    return model, plan, gm


def quantizers(gm):
    return [gm.get_submodule(f"{name}_quantizer") for name in ("twice.weight", "right", "up.weight")]


def test_annotate_tells_consumer_and_axis():
    _, plan, gm = annotated()
    found = {n.meta[META_KEY].name: (n.meta[META_KEY].consumer, n.meta[META_KEY].axis) for n in gm.graph.nodes if META_KEY in n.meta}
    assert found == {"twice.weight": ("linear", 0), "right": ("matmul", 1), "up.weight": ("conv_transpose1d", 1)}
    assert not annotate_weights(gm, plan).modified


@pytest.mark.parametrize(
    ("readers", "consumer", "axis"),
    [
        ([("linear", 1)], "linear", 0),
        *(([(name, 1)], name, 2) for name in ("matmul", "__matmul__", "mm", "bmm")),
        *(([(name, 2)], name, 2) for name in ("addmm", "baddbmm")),
        *(([(name, 0)], name, 0) for name in ("matmul", "mm", "bmm")),
        *(([(name, 1)], name, 0) for name in ("addmm", "baddbmm")),
        ([("conv_transpose2d", None)], "conv_transpose2d", 1),
        ([("LSTM", None), ("linear", 1), ("LSTM", None)], "LSTM, linear", 0),
        ([], "nothing", 0),
    ],
)
def test_the_first_reader_tells_the_axis(readers, consumer, axis):
    found = completed(WeightSpec(name="w", shape=(2, 3, 4), axis=0), readers)
    assert (found.consumer, found.axis) == (consumer, axis)


def test_a_module_that_reads_a_weight_is_named_by_its_class():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.reader = nn.Parameter(torch.randn(64, 64)), nn.Identity()

        def forward(self, x):
            return x @ self.reader(self.weight)

    model = Reads()
    plan = select_weights(model, MethodChoice.of(CONFIG, "test"), "test")
    gm = fx.symbolic_trace(model)
    assert annotate_weights(gm, plan).modified
    assert [node.meta[META_KEY].consumer for node in gm.graph.nodes if META_KEY in node.meta] == ["Identity"]


def test_insert_puts_one_node_on_a_weight_that_is_used_twice():
    _, _, gm = prepared()
    names = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert names == ["twice.weight_quantizer", "right_quantizer", "up.weight_quantizer"]
    (weight,) = [node for node in gm.graph.nodes if node.target == "twice.weight"]
    (quantizer,) = weight.users
    assert len(quantizer.users) == 2
    assert not insert_quantizers(gm).modified


def test_numerics_are_kept_with_the_noise_off():
    model, _, gm = prepared()
    for quantizer in quantizers(gm):
        weight = gm.get_parameter(quantizer.spec.name)
        quantizer.pass_through(lambda weight=weight: weight)
    assert torch.equal(gm(X), model(X))
    for quantizer in quantizers(gm):
        quantizer.pass_through(None)
    assert not torch.equal(gm(X), model(X))


def test_one_draw_serves_both_uses():
    _, _, gm = prepared()
    drawn = []
    quantizers(gm)[0].register_forward_hook(lambda module, args, output: drawn.append(output))
    gm(X)
    assert len(drawn) == 1


def test_the_graph_is_readable():
    _, _, gm = prepared()
    text = str(gm.graph)
    assert "%twice_weight_quantizer : [num_users=2] = call_module[target=twice.weight_quantizer](args = (%twice_weight,)" in text


@pytest.mark.parametrize("each", [insert_quantizers, replace_quantizers, verify_prepared])
def test_a_graph_without_weights_is_left_alone(each):
    gm = fx.symbolic_trace(NoWeight())
    before = str(gm.graph)
    result = each(gm)
    assert not result.modified
    assert str(gm.graph) == before


def test_annotate_leaves_other_weights_alone():
    _, plan, _ = captured()
    gm = captured()[2]  # another model: its parameters are not those of the plan
    assert not annotate_weights(gm, plan).modified


def test_replace_takes_the_stored_weight():
    _, _, gm = prepared()
    for quantizer in quantizers(gm):
        owner, attribute = owner_of(gm, quantizer.spec.name)
        owner.add_module(attribute + "_quantized", quantizer.store(gm.get_parameter(quantizer.spec.name).detach()))
    expected = gm.eval()(X)
    run_passes(gm, [replace_quantizers])
    assert not verify_converted(gm).modified
    assert torch.equal(gm(X), expected)
    assert not any(node.op == "get_attr" and str(node.target).endswith("weight") for node in gm.graph.nodes)
    assert not replace_quantizers(gm).modified


def test_verify_sees_a_reader_past_the_quantizer():
    _, _, gm = prepared()
    (weight,) = [node for node in gm.graph.nodes if node.target == "right"]
    (matmul,) = [node for node in gm.graph.nodes if node.op == "call_function" and "matmul" in str(node.target)]
    matmul.args = (matmul.args[0], weight)
    with pytest.raises(PassError, match=r"weight 'right': expected one reader, its quantizer; found .*matmul"):
        run_passes(gm, [verify_prepared])


def test_verify_sees_the_quantizer_of_another_weight():
    _, _, gm = prepared()
    (node,) = [node for node in gm.graph.nodes if node.target == "right_quantizer"]
    node.target = "up.weight_quantizer"
    with pytest.raises(PassError, match=r"weight 'right': its node is read by the quantizer of 'up\.weight'"):
        verify_prepared(gm)


def test_verify_sees_a_quantizer_that_is_left():
    _, _, gm = prepared()
    with pytest.raises(PassError, match=r"node 'twice_weight_quantizer' still quantizes weight 'twice\.weight'"):
        verify_converted(gm)
    with pytest.raises(PassError, match="reads no stored weight"):
        verify_converted(fx.symbolic_trace(NoWeight()))


def test_runner_names_the_pass_that_failed():
    def harmless(gm):
        return PassResult(gm, False)

    def broken(gm):
        raise ValueError("no such node")

    for each in (broken, partial(broken)):
        with pytest.raises(PassError, match=r"pass broken failed after \['harmless'\]: no such node"):
            run_passes(fx.symbolic_trace(NoWeight()), [harmless, each])


def test_runner_refuses_a_graph_that_a_pass_broke():
    def tangled(gm):
        (output,) = [node for node in gm.graph.nodes if node.op == "output"]
        first = next(iter(gm.graph.nodes))
        first.prepend(output)
        return PassResult(gm, True)

    with pytest.raises(PassError, match="pass tangled failed"):
        run_passes(fx.symbolic_trace(NoWeight()), [tangled])


def test_runner_accepts_partials():
    _, plan, gm = captured()
    assert run_passes(gm, [partial(annotate_weights, selection=plan)]) is gm
