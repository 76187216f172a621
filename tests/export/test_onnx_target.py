"""export_onnx(target=...): the decision over profiles, the measurement, and what is written about both."""

import itertools
from dataclasses import replace

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_models import Conv, Linear, Parallel, assert_same, optimized_ops, run_exact
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from diffq_fx import convert, prepare
from diffq_fx.cli import app
from diffq_fx.errors import ExportError
from diffq_fx.export import export_onnx, read_metadata
from diffq_fx.export.onnx import measuring
from diffq_fx.export.onnx.layout import profiles
from diffq_fx.export.onnx.layout.cost import FLOAT, Cost, Kernel, Product, Profile, choose
from diffq_fx.export.onnx.measuring import Stopwatch, prepare_run, product_model
from diffq_fx.methods import LC

PORTABLE = profiles.KINDS["portable"]  # as users have it: a fixture of this folder puts another one in its place
REAL = {kind: machines for kind, machines in profiles.KINDS.items() if kind != "portable"}
FORMS = (Kernel("fused 4", 32), Kernel("fused 8", 32), Kernel("dynamic int8"), Kernel("dynamic uint8"))
LAYER = Product(8, 512, 512)


def machine(name, margin=1.1, **speeds):
    """A machine on which each kernel takes so many times float's time per product, at any size."""
    costs = {kernel.replace("_", " "): Cost(0, 0, 0, 0, 0, 10.0 / speed) for kernel, speed in {"float": 1.0, **speeds}.items()}
    return Profile(name=name, source="by hand", margin=margin, costs=costs)


# The decision


def test_the_form_with_the_best_worst_machine_is_taken():
    first = machine("first", fused_4=4.0, fused_8=2.0, dynamic_int8=3.0)
    second = machine("second", fused_4=1.2, fused_8=2.5, dynamic_int8=1.5)
    kernels = FORMS[:3]
    assert [choose(kernels, LAYER, machines).kernel.name for machines in ([first], [second], [first, second])] == [
        "fused 4",
        "fused 8",
        "fused 8",
    ]


def test_a_form_that_one_machine_is_slow_with_is_left_out():
    fast, slow = machine("fast", fused_4=4.0, fused_8=1.5), machine("slow", fused_4=0.96, fused_8=1.2)
    assert choose(FORMS[:2], LAYER, [fast, slow]).kernel.name == "fused 8"
    choice = choose(FORMS[:1], LAYER, [fast, slow])
    assert choice.kernel == FLOAT
    assert choice.reason == (
        "512 inputs and 512 outputs: fused, 4 bits: predicted 0.96 times as fast as float on slow for 8 rows, and taken from 1.10 on"
    )


def test_a_machine_without_a_kernel_does_not_get_it():
    both, one = machine("both", fused_4=4.0, fused_8=1.5), machine("one", fused_8=1.5)
    assert choose(FORMS[:2], LAYER, [both, one]).kernel.name == "fused 8"
    assert "one has no such kernel" in choose(FORMS[:1], LAYER, [both, one]).reason


def test_the_margin_is_each_machine_s_own():
    sure, unsure = machine("sure", fused_4=1.2), machine("unsure", margin=1.3, fused_4=1.25)
    assert choose(FORMS[:1], LAYER, [sure]).kernel.name == "fused 4"
    assert "on unsure for 8 rows, and taken from 1.30 on" in choose(FORMS[:1], LAYER, [sure, unsure]).reason


def test_equally_fast_forms_take_the_first():
    near = machine("near", fused_4=2.0, fused_8=2.02)
    assert choose(FORMS[:2], LAYER, [near]).kernel.name == "fused 4"
    assert choose(FORMS[1::-1], LAYER, [near]).kernel.name == "fused 8"


def test_open_sizes_are_judged_at_more_rows_and_fixed_ones_are_not():
    costs = {"float": Cost(0, 0.05, 0, 0, 0, 10.0), "fused 4": Cost(0, 0.01, 0, 0, 0, 16.0)}
    few = Profile(name="few", source="by hand", margin=1.1, costs=costs)
    assert choose(FORMS[:1], Product(1, 512, 512), [few]).kernel.name == "fused 4"
    assert "on few for 32 rows, and taken from 0.80 on" in choose(FORMS[:1], Product(1, 512, 512, is_open=True), [few]).reason


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4), min_size=1, max_size=4))
def test_no_choice_is_below_the_margin_on_any_machine(speeds):
    names = [kernel.name for kernel in FORMS]
    machines = [machine(f"m{i}", **dict(zip((n.replace(" ", "_") for n in names), row, strict=True))) for i, row in enumerate(speeds)]
    choice = choose(FORMS, LAYER, machines)
    worst = {name: min(row[place] for row in speeds) for place, name in enumerate(names)}
    if choice.kernel == FLOAT:
        assert max(worst.values()) < 1.1 * (1 + 1e-9)
    else:
        assert worst[choice.kernel.name] >= 1.1 * (1 - 1e-9)
        assert worst[choice.kernel.name] >= 0.97 * max(worst.values()) * (1 - 1e-9)


SIZES = (16, 64, 256, 512, 1024, 2048, 4096)


@pytest.mark.parametrize("rows", [1, 8, 32, 256, 1024])
def test_portable_never_takes_a_form_that_a_kind_of_x86_is_slower_with(rows):
    for inputs, outputs, is_open in itertools.product(SIZES, SIZES, (False, True)):
        product = Product(rows, inputs, outputs, is_open)
        kernel = choose(FORMS, product, PORTABLE).kernel
        for kind in (*REAL["x86-avx2"], *REAL["x86-vnni"]):
            assert kind.times(FLOAT, product)[0] >= 0.97 * kind.times(kernel, product)[0], (product, kernel, kind.name)


@pytest.mark.parametrize("kind", REAL)
def test_what_every_profile_says(kind):
    for profile in REAL[kind]:
        assert profile.source
        assert profile.margin >= 1
        for rows, size in itertools.product((1, 32, 1024), (16, 32, 64)):
            assert choose(FORMS[:2], Product(rows, size, size), [profile]).kernel == FLOAT
        for name in ("fused 4", "fused 8"):
            times = [profile.times(Kernel(name, block), Product(32, 1024, 1024))[0] for block in (16, 32, 64, 128, 256)]
            assert times == sorted(times, reverse=True)
        assert choose(FORMS[:2], Product(1, 2048, 2048), [profile]).kernel != FLOAT


# The measurement


class FakeMachine:
    """A clock that stands still but while a kernel runs, for a time that is fixed or drawn."""

    def __init__(self, seconds):
        self.seconds, self.now, self.prepared = seconds, 0.0, []

    def clock(self):
        return self.now

    def prepare(self, kernel, product):
        self.prepared.append((kernel, product))

        def run():
            seconds = self.seconds[kernel.name]
            self.now += seconds() if callable(seconds) else seconds

        return run


def chosen(fake, product=LAYER, kernels=FORMS[:3]):
    machines = Stopwatch(fake.clock, fake.prepare)(product, kernels)
    return choose(kernels, product, machines)


def test_measuring_takes_the_fastest():
    times = {"float": 2e-4, "fused 4": 1.9e-4, "fused 8": 1e-4, "dynamic int8": 3e-4}
    choice = chosen(FakeMachine(times))
    assert choice.kernel.name == "fused 8"
    assert choice.reason == "fused, 8 bits: measured to be the fastest on this machine for 8 rows"
    assert choice.time == pytest.approx(0.5 * 200.0)


def test_measuring_keeps_float_where_nothing_is_clearly_faster():
    choice = chosen(FakeMachine({"float": 2e-4, "fused 4": 1.96e-4, "fused 8": 3e-4, "dynamic int8": 3e-4}))
    assert choice.kernel == FLOAT
    assert choice.reason.endswith("fused, 4 bits, measured on this machine for 8 rows: not faster than float")


def test_measuring_does_not_mind_a_disturbed_run_now_and_then():
    own_runs = itertools.count(1)

    def disturbed():
        return 5e-2 if next(own_runs) % 5 == 0 else 1e-3

    times = {"float": 2e-3, "fused 4": disturbed, "fused 8": 1.8e-3, "dynamic int8": 3e-3}
    assert chosen(FakeMachine(times)).kernel.name == "fused 4"


def test_what_is_written_about_a_measurement_has_no_time_in_it():
    reasons = {chosen(FakeMachine({"float": 2e-4, "fused 4": t, "fused 8": 1e-3, "dynamic int8": 1e-3})).reason for t in (1e-4, 1.1e-4)}
    assert len(reasons) == 1


def test_each_product_is_measured_once():
    fake = FakeMachine(dict.fromkeys((kernel.name for kernel in (FLOAT, *FORMS)), 1e-4))
    watch = Stopwatch(fake.clock, fake.prepare)
    first = watch(LAYER, FORMS)
    assert watch(LAYER._replace(is_open=True), FORMS) == first
    assert [kernel for kernel, _ in fake.prepared] == [FLOAT, *FORMS]


@pytest.mark.parametrize("seconds", [1e-6, 1e-3, 0.2])
def test_measuring_is_bounded(seconds, caplog):
    fake = FakeMachine(dict.fromkeys((kernel.name for kernel in (FLOAT, *FORMS)), seconds))
    watch = Stopwatch(fake.clock, fake.prepare)
    told = [watch(Product(rows, 512, 512), FORMS) for rows in range(1, 200)]
    assert fake.now < measuring._LIMIT_SECONDS + 8
    assert "s are the limit" in caplog.text
    assert told[-1] == profiles.KINDS["portable"]
    assert Product(199, 512, 512) in watch.skipped


def test_of_a_large_product_a_part_is_measured():
    fake = FakeMachine({"float": 1e-3, "fused 4": 5e-4})
    (measured,) = Stopwatch(fake.clock, fake.prepare)(Product(4096, 4096, 32000), FORMS[:1])
    for _, part in fake.prepared:
        assert part.inputs == 4096
        assert part.inputs * part.outputs <= 2**24
        assert part.rows * part.inputs * part.outputs <= 2**31
    cut = 4096 * 32000 / (part.rows * part.outputs)
    assert measured.times(FLOAT, LAYER)[0] == pytest.approx(1e3 * cut)


@pytest.mark.parametrize(
    ("kernel", "op"),
    [
        (FLOAT, "MatMul"),
        *((Kernel(f"fused {bits}", 32), "MatMulNBits") for bits in (2, 4, 8)),
        *((Kernel(f"dynamic {kind}"), "DynamicQuantizeMatMul") for kind in ("int8", "uint8")),
    ],
)
def test_what_is_measured_is_what_the_kernel_says(kernel, op, tmp_path):
    onnx.save(measuring.ir.to_proto(product_model(kernel, Product(4, 128, 64))), tmp_path / "product.onnx")
    assert optimized_ops(tmp_path / "product.onnx", tmp_path) == [op]
    assert prepare_run(kernel, Product(4, 128, 64))()[0].shape == (4, 64)


# The file


def test_the_target_decides(path, monkeypatch):
    monkeypatch.setitem(profiles.KINDS, "x86-avx2", (machine("x86-avx2", fused_4=3.0, fused_8=2.0, dynamic_int8=1.0),))
    monkeypatch.setitem(profiles.KINDS, "x86-vnni", (machine("x86-vnni", fused_4=0.5, fused_8=0.5, dynamic_int8=4.0),))
    rules = {}
    for target in ("x86-avx2", "x86-vnni"):
        result = export_onnx(Linear(64, 32, 4).eval(), torch.randn(2, 64), path, target=target, activations="dynamic")
        assert result.target == read_metadata(path).target == target
        rules[target] = result.weights[0].rule, result.weights[0].choice
    assert rules == {
        "x86-avx2": ("linear", "fused, 4 bits: predicted 3.00 times as fast as float on x86-avx2 for 2 rows"),
        "x86-vnni": ("dynamic", "dynamic, int8 weights: predicted 4.00 times as fast as float on x86-vnni for 2 rows"),
    }


def test_a_file_measured_here_is_right_and_says_so(path, monkeypatch):
    times = {"float": 2e-4, "fused 4": 1e-4, "fused 8": 1.5e-4, "fused 2": 1e-4}
    fake = FakeMachine(times)
    monkeypatch.setattr(measuring, "machines_of", lambda target: Stopwatch(fake.clock, fake.prepare))
    mixed = torch.tensor([2, 4])[torch.arange(64) % 2][:, None]
    model = Parallel(Linear(64, 64, 4, name="whole"), Linear(64, 64, mixed, name="mixed"), Linear(64, 64, 4, name="again")).eval()
    result = export_onnx(model, torch.randn(2, 64), path, target="this-machine")
    assert {record.choice for record in result.weights} == {"fused, 4 bits: measured to be the fastest on this machine for 2 rows"}
    assert len(fake.prepared) == 3  # float and two forms, once for three layers of one size
    fresh = torch.randn(5, 64)
    assert_same(run_exact(path, fresh), model(fresh))
    first = path.read_bytes()
    times.update(float=2.1e-4, **{"fused 8": 1.7e-4})
    export_onnx(model, torch.randn(2, 64), path, target="this-machine")
    assert path.read_bytes() == first


def test_this_machine_is_measured_with_onnxruntime(path, monkeypatch):
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    result = export_onnx(nn.Sequential(Linear(64, 64, 4, name="w")).eval(), torch.randn(2, 64), path, target="this-machine")
    (record,) = result.weights
    assert "measured" in f"{record.choice}, {record.reason}"


def test_products_for_which_there_was_no_time_are_remarked(path, monkeypatch):
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "_LIMIT_SECONDS", -1.0)
    with pytest.warns(UserWarning, match="over before 1 products: their form is that of the portable profiles"):
        result = export_onnx(Linear(512, 512, 4).eval(), torch.randn(1, 512), path, target="this-machine")
    assert "on quick" in result.weights[0].choice


def test_inspect_shows_target_and_reasons(path):
    model = Parallel(Linear(512, 512, 4, name="large"), Linear(512, 16, 4, name="small")).eval()
    export_onnx(model, torch.randn(1, 512), path)
    told = " ".join(CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "200"}).stdout.split())
    assert "target portable" in told
    assert "large affine linear fused, 4 bits: predicted" in told
    assert "small affine fold float, made once when the file is loaded 512 inputs and 16 outputs: fused" in told


def test_every_record_says_what_was_taken(path):
    conv, x = Conv(F.conv2d, (8, 4, 3, 3), 4), torch.randn(1, 4, 8, 8)
    conv.weight.spec = replace(conv.weight.spec, aliases=("tied",))
    taken = [
        export_onnx(conv.eval(), x, path, **settings).weights[0]
        for settings in ({}, {"layout": "qdq"}, {"activations": "int8", "calibration": [x]})
    ]
    assert [record.rule for record in taken] == ["fold", "qdq", "int8"]
    assert {record.aliases for record in taken} == {("tied",)}
    assert [record.choice.partition(":")[0] for record in taken] == [
        "float, made once when the file is loaded",
        "one DequantizeLinear",
        "integer convolution",
    ]
    assert "read by Conv" in taken[0].reason
    coded = convert(prepare(nn.Linear(64, 32), torch.randn(2, 64), LC(entries=5)))
    (record,) = export_onnx(coded, torch.randn(2, 64), path).weights
    assert (record.grid, record.rule, record.choice) == ("codebook", "codebook", "float, looked up once when the file is loaded")
    assert read_metadata(path).weights == (record,)


def test_a_batch_that_is_fixed_is_judged_as_it_is(path, monkeypatch):
    costs = {"float": Cost(0, 0.05, 0, 0, 0, 10.0), "fused 4": Cost(0, 0.01, 0, 0, 0, 16.0)}
    monkeypatch.setitem(profiles.KINDS, "arm64", (Profile(name="few", source="by hand", margin=1.1, costs=costs),))
    fixed = export_onnx(Linear(512, 512, 4).eval(), torch.randn(1, 512), path, target="arm64", dynamic_shapes={"x": {}})
    assert fixed.weights[0].rule == "linear"
    free = export_onnx(Linear(512, 512, 4).eval(), torch.randn(1, 512), path, target="arm64")
    assert "for 32 rows" in free.weights[0].reason


@pytest.mark.parametrize("target", ["x86", "", None, ("portable",)])
def test_an_unknown_target_is_refused(target, old_file):
    with pytest.raises(ValueError, match=r"target must be one of \('portable', 'x86-avx2', 'x86-vnni', 'arm64', 'this-machine'\), got"):
        export_onnx(Linear(16, 8, 4).eval(), torch.randn(2, 16), old_file, target=target)


@pytest.mark.parametrize("target", ["x86-avx2", "this-machine"])
def test_a_target_with_qdq_is_refused(target, old_file):
    with pytest.raises(ValueError, match=f'"qdq" has one form for every weight, got target={target!r}'):
        export_onnx(Linear(16, 8, 4).eval(), torch.randn(2, 16), old_file, layout="qdq", target=target)


def test_qdq_has_no_target(path):
    result = export_onnx(Linear(16, 8, 4).eval(), torch.randn(2, 16), path, layout="qdq")
    assert result.target is read_metadata(path).target is None


def test_an_opset_without_blocks_leaves_products_in_float_and_says_so(path):
    result = export_onnx(Linear(512, 512, 8).eval(), torch.randn(1, 512), path, opset=20)
    assert (result.opset, result.weights[0].rule) == (20, "fold")
    assert "no DequantizeLinear with blocks: fused products need 21" in result.weights[0].reason
    whole = export_onnx(Linear(512, 512, 8).eval(), torch.randn(8, 512), path, opset=20, activations="dynamic")
    assert whole.weights[0].rule == "dynamic"


@pytest.mark.parametrize("opset", ["21", 21.0, (21,)])
def test_an_opset_that_is_no_number_is_refused(opset, old_file):
    with pytest.raises(TypeError, match="opset must be a whole number or None, got"):
        export_onnx(Linear(16, 8, 4).eval(), torch.randn(2, 16), old_file, opset=opset)


def test_an_opset_without_the_container_is_an_error(old_file):
    for target in ("portable", "this-machine"):
        with pytest.raises(ExportError, match="opset 20 is too low: UINT4 of 'weight.levels' needs 21"):
            export_onnx(Linear(512, 512, 4).eval(), torch.randn(1, 512), old_file, opset=20, target=target)
