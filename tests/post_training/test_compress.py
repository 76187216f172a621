"""compress: what it takes, what it leaves alone, what it gives, and what each bad input is told."""

import copy
import dataclasses
import gc
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffq_fx import DiffQConfig, DiffQError, PreparationError, bits_report, compress, prepare_diffq
from diffq_fx.compression import Compression
from diffq_fx.export import save_packed
from diffq_fx.functional.groups import to_rows
from diffq_fx.methods import LSQ, STE
from diffq_fx.post_training import batches as reading
from diffq_fx.post_training import compress as stages
from diffq_fx.post_training import limits, moments, reference, round_weights, tuning
from diffq_fx.post_training.tuning import Masters
from diffq_fx.training.output_loss import output_loss, outputs_of
from diffq_fx.training.phases import coded_excess


class Net(nn.Module):
    """A small classifier with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu())) * 40


def make(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    return kind()


def batches(count: int = 9, rows: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 16, generator=generator) for _ in range(count)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def no_factor(*args: object, **more: object) -> Tensor:
    raise ValueError("no factor")


def run(model: nn.Module | None = None, data: object = None, config: object = None, **settings: object) -> nn.Module:
    settings = {"progress": False, "steps": 4, **settings}
    return compress(make() if model is None else model, batches() if data is None else data, config, **settings)  # pyright: ignore[reportArgumentType]


class TestResult:
    def test_is_converted_within_the_target_and_says_what_was_done(self) -> None:
        converted = run(config=DiffQConfig(target_bits=3))
        report = bits_report(converted)
        assert report.stage == "converted"
        assert 2.8 < report.average_bits_in_all <= 3
        assert "8 batches and 1 held out, KL divergence of class scores of output" in report.notes[-1]
        assert "steps of distillation" in report.notes[-1]
        assert report.notes[-1] in str(report)

    def test_target_mib_is_that_of_the_whole_model(self) -> None:
        assert 0.0019 < bits_report(run(config=DiffQConfig(target_mib=0.002))).packed_size.total_mib <= 0.002

    def test_is_the_same_twice_and_leaves_the_random_state(self) -> None:
        model, before = make(), torch.get_rng_state()
        one = run(model)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(3)
        assert same_state(run(model), state_of(one))

    def test_tuning_helps(self) -> None:
        model, held_out, config = make(), torch.randn(512, 16, generator=torch.Generator().manual_seed(9)), DiffQConfig(target_bits=3)
        wanted = model.eval()(held_out).detach()
        kl = [float(output_loss(run(model, batches(17, 32), config, steps=steps)(held_out).detach(), wanted)) for steps in (0, 150)]
        assert kl[1] < kl[0]

    def test_mapping_of_patterns_and_exclude(self) -> None:
        converted = run(config={"first": DiffQConfig(target_bits=4), "last": DiffQConfig(target_bits=4, min_bits=2, max_bits=4)})
        assert {weight.name for weight in bits_report(converted).weights} == {"first.weight", "last.weight"}
        fixed = bits_report(run(config={"last": STE(bits=8), "*": DiffQConfig(target_bits=4)}))
        assert {weight.name: weight.min_bits for weight in fixed.weights}["last.weight"] == 8
        left = run(config=DiffQConfig(target_bits=5, exclude=("last",)))
        assert isinstance(left.last.weight, nn.Parameter)

    @pytest.mark.parametrize("size_of", ["onnx_file", "packed_file"])
    def test_every_size(self, size_of: str) -> None:
        assert bits_report(run(config=DiffQConfig(target_bits=4, size_of=size_of))).stage == "converted"

    @pytest.mark.parametrize("settings", [{"size_of": "packed_file"}, {"clip_ranges": False}], ids=str)
    def test_ranges_that_follow_the_weights(self, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
        """The weights are rounded with compensation on the grids that they span, and these stay as they are."""
        grids: list[list[Tensor]] = []

        def grids_of(compression: Compression) -> list[Tensor]:
            pairs = [(to_rows(each.weight.detach(), each.spec.axis), each.rounded_bits()) for each in compression.learned]
            stretched = compression.range_scale if compression.is_coded else 1  # so that the code takes the target
            return [each.params(*pair).scale / stretched for each, pair in zip(compression.learned, pairs, strict=True)]

        compensated, excess = round_weights.compensate, round_weights.coded_excess
        monkeypatch.setattr(
            round_weights, "coded_excess", lambda compression: (grids.append(grids_of(compression)), excess(compression))[1]
        )
        config, distances = DiffQConfig(target_bits=4, **settings), []  # pyright: ignore[reportArgumentType]
        for compensates in (True, False):
            monkeypatch.setattr(round_weights, "compensate", compensated if compensates else no_factor)
            notes = run(config=config, steps=0).compression.notes
            assert any("rounded to the nearest" in note for note in notes) != compensates
            distances.append(float(re.findall(r"output: (\S+) after rounding", notes[-1])[0]))
        assert distances[0] < 0.9 * distances[1]
        for one, *others in zip(*grids, strict=True):
            for other in others:
                torch.testing.assert_close(one, other)

    def test_a_coded_size_is_met_with_compensation_and_better_than_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The ranges are scaled to the size before the weights are rounded: compensation for one scale is worthless on another."""
        found: list[float] = []

        def noted(model: nn.Module, compression: Compression, *args: object) -> object:
            found.append(coded_excess(compression))
            return tuned(model, compression, *args)  # pyright: ignore[reportArgumentType]

        tuned, seen = stages.tune, list[float]()
        monkeypatch.setattr(stages, "tune", noted)
        monkeypatch.setattr(round_weights, "coded_excess", lambda compression: seen.append(coded_excess(compression)) or seen[-1])
        distances = []
        for compensates in (True, False):
            monkeypatch.setattr(round_weights, "compensate", round_weights.compensate if compensates else no_factor)
            notes = run(config=DiffQConfig(target_bits=3, size_of="packed_file"), steps=0).compression.notes
            distances.append(float(re.findall(r"output: (\S+) after rounding", notes[-1])[0]))
        assert distances[0] < 0.95 * distances[1]
        assert max(found) <= 0
        assert abs(seen[0]) < 0.05  # the widths are those of this rounding

    @pytest.mark.parametrize(
        ("norm", "value"),
        [(nn.BatchNorm1d, 0.0), (nn.LayerNorm, torch.linspace(0.5, 2, 128).bfloat16().float())],
        ids=["constant", "few digits"],
    )
    def test_a_coded_size_is_met_and_tuning_spends_nothing_on_what_is_not_quantized(
        self, norm: type[nn.Module], value: float | Tensor, tmp_path: Path
    ) -> None:
        torch.manual_seed(1)
        model, target = nn.Sequential(nn.Linear(16, 128), norm(128), nn.ReLU(), nn.Linear(128, 64)), 0.0065
        for module in (model[0], model[1]):
            module.bias.data[:] = value
        distances = []
        for steps in (0, 40):
            converted = run(model, config=DiffQConfig(target_mib=target, size_of="packed_file"), steps=steps)
            distances.append(float(re.findall(r"(\S+) after \d+ steps", converted.compression.notes[-1])[0]))
            save_packed(converted, tmp_path / "file")
            assert 0.94 < (tmp_path / "file").stat().st_size / 2**20 / target < 1.02
        assert distances[1] < distances[0]
        assert torch.equal(converted[1].bias, model[1].bias)
        free = run(model, config=DiffQConfig(target_bits=4, size_of="packed_file"), steps=40)
        assert not torch.equal(free[1].bias, model[1].bias), "there it takes no bits from the weights"

    @pytest.mark.parametrize("settings", [{}, {"size_of": "packed_file"}], ids=str)
    def test_is_never_worse_than_rounding_to_nearest(self, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
        config, found = DiffQConfig(target_bits=4, **settings), []  # pyright: ignore[reportArgumentType]
        compensated = round_weights.compensate
        for does in (no_factor, lambda rows, *args, **more: compensated(rows * 0.3, *args, **more)):
            monkeypatch.setattr(round_weights, "compensate", does)
            converted = run(config=config, steps=0)
            assert "rounded to the nearest levels (error compensation brings the outputs no nearer" in str(converted.compression.notes)
            found.append(converted)
        assert same_state(found[0], state_of(found[1]))

    @pytest.mark.parametrize(
        "settings", [{"target_bits": 3}, {"size_of": "packed_file"}, {"target_bits": 3, "clip_ranges": False}], ids=str
    )
    def test_is_never_worse_than_the_prepared_model_as_it_is(self, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
        config = DiffQConfig(**settings)  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(round_weights, "_nearest", lambda learned, price: [each.weight.neg_() for each in learned])
        monkeypatch.setattr(round_weights, "compensate", lambda rows, *args, **more: -rows)
        found, plain = run(config=config, steps=0), prepare_diffq(make(), batches()[0], config).eval()
        for name, inputs in (("first", 16), ("last", 64)):
            assert torch.equal(*(model.get_submodule(name)(torch.eye(inputs)) for model in (found, plain)))
        assert "the same in all groups" in bits_report(found).allocation

    def test_a_weight_that_cannot_be_compensated_is_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compensated = round_weights.compensate

        def failing(rows: Tensor, *args: object, **more: object) -> Tensor:
            if rows.shape[1] == 64:
                raise ValueError("no factor")
            return compensated(rows, *args, **more)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(round_weights, "compensate", failing)
        assert "rounded to the nearest levels (no factor): last.weight" in bits_report(run()).notes

    def test_float16_is_tuned(self) -> None:
        notes = run(make().half(), [batch.half() for batch in batches(17, 32)], DiffQConfig(target_bits=4), steps=60).compression.notes
        found = re.search(r"([\d.e-]+) after rounding, ([\d.e-]+) after", notes[-1])
        assert "diverged" not in notes[-1]
        assert found is not None
        assert float(found[2]) < 0.97 * float(found[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_small_steps_add_up_in_half_precision(self, dtype: torch.dtype) -> None:
        parameters = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3))]
        address, masters, optimizer = parameters[0].data_ptr(), Masters(parameters), torch.optim.SGD(parameters, lr=1e-4)
        for _ in range(100):
            for each in parameters:
                each.grad = torch.ones_like(each)
            with masters.stand_in():
                optimizer.step()
        assert (parameters[0].dtype, parameters[0].data_ptr()) == (dtype, address)
        for each in parameters:
            torch.testing.assert_close(each.detach().float(), torch.full((3,), 0.99), atol=0.004, rtol=0)

    @pytest.mark.parametrize("rows", [1, 6])
    def test_a_small_batch_counts_nothing_in_batch_norms(self, rows: int) -> None:
        data = [*batches(7), batches(1, rows)[0], batches(1)[0]]  # one row cannot be normalized at all
        assert bits_report(run(data=data)).stage == "converted"
        read = reading.Calibration(data, torch.device("cpu"))
        assert [len(example.tensors[0]) for example in read.large()] == [12] * 7

    def test_one_batch_is_not_called_held_out(self) -> None:
        assert run(data=batches(1)).compression.notes[-1].startswith("compressed by 1 batch, none held out, ")

    def test_a_tuning_that_diverges_ends_and_is_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loss, count = reference.output_loss, itertools.count(1)
        monkeypatch.setattr(reference, "output_loss", lambda *args, **kw: loss(*args, **kw) * (1 if next(count) < 25 else float("nan")))
        converted = run(steps=20)
        assert "which then diverged" in converted.compression.notes[-1]
        assert all(bool(parameter.isfinite().all()) for parameter in converted.parameters())


class TestMinutes:
    """With a clock that goes on by a second with every forward, and by nothing else."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [0.0]

        def slow(done: Callable[..., object]) -> Callable[..., object]:
            def ticking(*args: object, **kwargs: object) -> object:
                now[0] += 1
                return done(*args, **kwargs)

            return ticking

        monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
        for where, name in ((reference, "output_loss"), (reference, "_run"), (moments.WeightUses, "forget_copies")):
            monkeypatch.setattr(where, name, slow(getattr(where, name)))
        return now

    @pytest.mark.parametrize("minutes", [1.5, 3])
    def test_bound_the_whole_call(self, minutes: float, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "_PATIENCE", 100)
        converting = stages.convert

        def slow(model: nn.Module) -> nn.Module:
            clock[0] += 9
            return converting(model)

        monkeypatch.setattr(stages, "convert", slow)
        run(data=batches(40), minutes=minutes, steps=1000)
        assert 0.7 * 60 * minutes < clock[0] < 60 * minutes

    def test_are_shared_out_so_that_every_stage_has_some(self, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        at: dict[str, float] = {}

        def note_the_end_of(stage: str) -> None:
            done = getattr(stages, stage)

            def noted(*args: object) -> object:
                result = done(*args)
                at[stage] = clock[0]
                return result

            monkeypatch.setattr(stages, stage, noted)

        note_the_end_of("seek_bits")
        note_the_end_of("round_weights")
        run(data=batches(40), minutes=1.5, steps=1000)
        assert at["seek_bits"] < 0.25 * 90
        assert at["round_weights"] < 0.75 * 90


def test_outputs_of_held_out_batches_are_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_KEPT_BYTES", 12 * 10 * 4)  # one batch's
    data = reading.Calibration(batches(), torch.device("cpu"))
    wanted = reference.FloatOutputs(make(), None, data)
    held_out, tuned_on = data.held_out[0], data.tuned_on[0]
    assert wanted.of(held_out) is wanted.of(held_out)
    assert wanted.of(tuned_on) is not wanted.of(tuned_on)


def test_the_callers_autocast_is_that_of_the_forwards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, types = reference.output_loss, []
    monkeypatch.setattr(reference, "_refuse_random", lambda *args: None)  # which runs before
    monkeypatch.setattr(reference, "output_loss", lambda own, *args, **kw: types.append(own.dtype) or loss(own, *args, **kw))
    with torch.autocast("cpu", torch.bfloat16):
        converted = run(steps=20)
    assert set(types) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in converted.parameters())
    wanted, x = make().eval(), batches()[0]
    assert float(output_loss(converted(x), wanted(x)).detach()) < 1.5 * float(output_loss(run(steps=20)(x), wanted(x)).detach())


class TestWhatIsCompared:
    @pytest.mark.parametrize("exponent", [66, -66])
    def test_features_of_any_size(self, exponent: int) -> None:
        class Features(Net):
            power = 0

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).tanh() * 2.0**self.power

        class Scaled(Features):
            power = exponent

        expected, found = run(make(Features)), run(make(Scaled))
        assert "squared error of output" in found.compression.notes[-1]
        assert same_state(found, state_of(expected))

    def test_features_by_their_squared_error(self) -> None:
        class Features(Net):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.normalize(super().forward(x), dim=-1)

        assert "squared error of output" in run(make(Features)).compression.notes[-1]

    def test_the_kind_that_is_given_counts(self) -> None:
        assert "squared error of output" in run(kind="features", steps=0).compression.notes[-1]
        with pytest.raises(ValueError, match="kind must be one of .*, got 'classes'"):
            run(kind="classes")

    def test_outputs_in_containers(self) -> None:
        @dataclasses.dataclass
        class Out:
            logits: Tensor
            features: tuple[Tensor, Tensor]

        class Model(Net):
            def forward(self, x: Tensor) -> Out:
                hidden = self.first(x)
                return Out(self.last(self.norm(hidden)), (hidden, x))

        assert list(outputs_of(Out(torch.ones(1), (torch.ones(1), torch.ones(2))))) == ["logits", "features.0", "features.1"]
        assert "class scores of logits:" in run(make(Model)).compression.notes[-1]  # the scores alone

    def test_places_without_input_do_not_count(self) -> None:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(16, 16)

            def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
                return self.layer(x)

        model, x, mask = Encoder(), torch.randn(2, 3, 16), torch.tensor([[1, 1, 0], [1, 0, 0]])
        example = reading.Example.of({"x": x, "attention_mask": mask})
        wanted = reference.FloatOutputs(model, None, reading.Calibration([example], torch.device("cpu")))

        class Wrong(Encoder):
            def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
                return self.layer(x) + 100 * (1 - attention_mask[..., None])

        wrong = Wrong()
        wrong.load_state_dict(model.state_dict())
        assert float(wanted.distance(wrong, example).detach()) == 0

    def test_another_teacher(self) -> None:
        model, teacher = make(), make()
        with torch.no_grad():
            teacher.last.bias += torch.arange(10.0)
        teacher.train()
        state = state_of(teacher)
        biases = [run(model, teacher=each, steps=30).last.bias for each in (None, teacher)]
        assert float(biases[1].detach()[9] - biases[0].detach()[9]) > 0
        assert teacher.training
        assert same_state(teacher, state)

    def test_a_teacher_that_shares_the_parameters_is_not_trained(self) -> None:
        model = make()
        state = state_of(model)
        run(model, teacher=model)
        assert same_state(model, state)


def test_batches_are_left_alone_by_a_forward_that_changes_its_inputs() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    data = batches()
    converted = run(make(InPlace), data)
    assert all(torch.equal(*each) for each in zip(data, batches(), strict=True))
    assert converted.compression.notes == run(make(InPlace), (each.clone() for each in batches())).compression.notes


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("training", [True, False])
    def test_after_a_call(self, training: bool) -> None:
        model = make().train(training)
        model.first.weight.requires_grad_(False)
        before, names = state_of(model), sorted(vars(model))
        run(model)
        assert model.training is training
        assert not model.first.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert sorted(vars(model)) == names
        assert same_state(model, before)

    @pytest.mark.parametrize("stage", ["FloatOutputs", "prepare_as", "seek_bits", "round_weights", "tune", "convert"])
    def test_after_an_interruption(self, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        done = getattr(stages, stage)

        def interrupted(*args: object, **kwargs: object) -> object:
            done(*args, **kwargs)
            raise KeyboardInterrupt

        model = make()
        before = state_of(model)
        monkeypatch.setattr(stages, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model)
        assert same_state(model, before)
        assert model.training
        monkeypatch.undo()
        run(model)  # and it can be compressed still

    @pytest.mark.parametrize(
        ("where", "name", "calls"),
        [
            (reference, "output_loss", 5),
            (reference, "output_loss", 25),
            (round_weights, "compensate", 2),
            (moments.WeightUses, "forget_copies", 3),
        ],
    )
    def test_within_a_stage(self, where: object, name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
        done, count = getattr(where, name), itertools.count(1)

        def interrupting(*args: object, **kwargs: object) -> object:
            if next(count) == calls:
                raise KeyboardInterrupt
            return done(*args, **kwargs)

        model = make()
        before, fast = state_of(model), torch.backends.mha.get_fastpath_enabled()
        monkeypatch.setattr(where, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(model)
        assert same_state(model, before)
        assert model.training
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert torch.is_grad_enabled()


class Losing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


class NeedsLabels(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(super().forward(x), labels)


class GivesNothing(Net):
    def forward(self, x: Tensor) -> str:
        return "done"


class NoGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Complex(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(super().forward(x), super().forward(x))


class Classes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


class Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1)  # training=True is its default


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class Conditioned(Net):
    def forward(self, x: Tensor, target: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return super().forward(x if target is None else x + target)


class Masked(Net):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x * attention_mask.view(len(x), -1)[:, :1])


class Keeping(Net):
    """Counts its forwards in a buffer, in one that no state_dict has and in a number, and keeps its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, "nothing"
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(12, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.seen = self.calls + 1, str(x.shape)
        self.counted += 1
        self.latest = x
        return super().forward(x)


class NotFinite(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log()


_X = torch.ones(2, 16)
_BAD = {
    "no batch": ({"data": []}, ValueError, "there is no batch"),
    "one batch": ({"data": _X}, TypeError, r"got one Tensor: give \[batch\]"),
    "no iterable": ({"data": 3}, TypeError, "must be an iterable of inputs"),
    "an empty batch": ({"data": [_X, torch.ones(0, 16)]}, ValueError, "batch 1 is empty"),
    "arrays": ({"data": [_X.numpy()]}, TypeError, r"batch 0 holds no torch\.Tensor \(float32 \(2, 16\)"),
    "lists": ({"data": [{"x": _X.tolist()}]}, TypeError, r"batch 0 holds no torch\.Tensor \(x=list\)"),
    "nothing in a batch": ({"data": [{}]}, ValueError, "batch 0 is empty"),
    "a mask of nothing": (
        {
            "model": Masked(),
            "data": [{"x": _X, "attention_mask": torch.ones(2)}, {"x": _X, "attention_mask": torch.zeros(2, dtype=torch.long)}],
        },
        ValueError,
        "the attention_mask of batch 1 is 0 everywhere",
    ),
    "a later wrong size": (
        {"data": [_X, _X, torch.ones(2, 5)]},
        ValueError,
        r"the model, a Net, does not run on a batch \(torch\.float32 \(2, 5\)",
    ),
    "text": ({"data": ["text"]}, TypeError, "batch 0"),
    "another structure": ({"data": [_X, (_X, _X)]}, ValueError, "batch 1 has another structure than batch 0: expected .*float32"),
    "another dtype": ({"data": [_X, _X.double()]}, ValueError, "another structure.*float64"),
    "labels beside": ({"data": [(_X, torch.ones(2))]}, ValueError, "takes 1 input and the batches hold 2, labels among them"),
    "labels by name": ({"data": [{"x": _X, "labels": torch.ones(2)}]}, ValueError, "hold 'labels', and no labels are wanted"),
    "labels by name that are taken": (
        {"model": Conditioned(), "data": [{"x": _X, "target": _X, "labels": _X}]},
        ValueError,
        "hold 'labels', and no labels are wanted",
    ),
    "a random model": ({"model": Random()}, ValueError, "the model, a Random, answers differently when it is asked twice"),
    "a model that counts": ({"model": Counting()}, ValueError, "the model, a Counting, answers differently"),
    "a random teacher": ({"teacher": Random()}, ValueError, "the teacher, a Random, answers differently"),
    "a random model with a teacher": ({"model": Random(), "teacher": Net()}, ValueError, "the model, a Random, answers differently"),
    "wrong size": ({"data": [torch.ones(2, 5)]}, ValueError, "does not run on a batch"),
    "returns a loss": ({"model": Losing()}, ValueError, "the model, a Losing, returns a loss"),
    "needs labels": ({"model": NeedsLabels()}, ValueError, "A model that needs labels or a loss"),
    "no output": ({"model": GivesNothing()}, ValueError, "returns no real float tensor to imitate, got str"),
    "complex output": ({"model": Complex()}, ValueError, r"returns no real float tensor to imitate, got torch\.complex64"),
    "whole numbers": ({"model": Classes()}, ValueError, r"returns no real float tensor to imitate, got torch\.int64"),
    "no gradient": ({"model": NoGradient()}, PreparationError, "no gradient comes from the outputs to the quantized weights"),
    "NaN": ({"model": NotFinite()}, ValueError, "output output is not finite in"),
    "no model": ({"model": 3}, TypeError, r"expected a torch\.nn\.Module"),
    "out of reach": ({"config": DiffQConfig(target_bits=0.5)}, ValueError, "compress: target_bits=0.5 cannot be reached"),
    "a penalty": ({"config": DiffQConfig(penalty=5.0)}, ValueError, "penalty=5 is no size to meet"),
    "no aim": ({"config": DiffQConfig(target_bits=None)}, ValueError, "no target is no size to meet. Give target_bits or target_mib"),
    "another method": ({"config": {"last": LSQ(bits=4), "*": DiffQConfig()}}, TypeError, "'last' has LSQ, which needs a training"),
    "no target": ({"config": STE(bits=4)}, ValueError, "a DiffQConfig with a target is needed for some of the weights, got STE for all"),
    "no config": ({"config": 4}, TypeError, "expected a method"),
    "teacher": ({"teacher": 3}, TypeError, "teacher must be"),
    "another teacher": ({"teacher": nn.Linear(16, 3)}, ValueError, r"must be those of the model, output \(12, 10\); got output \(12, 3\)"),
    "a teacher of other inputs": ({"teacher": nn.Linear(5, 3)}, ValueError, "the teacher, a Linear, does not run on a batch"),
    "a teacher without outputs": ({"teacher": Classes()}, ValueError, "the teacher, a Classes, returns no real float tensor"),
    "a teacher that gives NaN": ({"teacher": NotFinite()}, ValueError, "the float teacher's output output is not finite"),
    "steps": ({"steps": -1}, ValueError, "steps must be a whole number of at least 0"),
    "minutes": ({"minutes": 0}, ValueError, "minutes must be a positive number, got 0"),
}


@pytest.mark.parametrize("name", ["target", "label"])
def test_an_input_with_the_name_of_labels_is_none_where_outputs_depend_on_it(name: str) -> None:
    class Named(Net):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return super().forward(x + more[name] if name in more else x)

    assert bits_report(run(make(Named), data=[{"x": x, name: x.flip(0)} for x in batches()])).average_bits_in_all <= 4
    assert bits_report(run(make(Conditioned), data=[{"x": x, "target": x.flip(0)} for x in batches()])).average_bits_in_all <= 4


def test_what_forwards_count_and_keep_is_not_that_of_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.Best, "restore", lambda _: None)  # what was tuned stays, better or not: norms are measured anew
    converted = run(make(Keeping), steps=3)
    assert (converted.calls, converted.seen, float(converted.counted), float(converted.latest.abs().sum())) == (0, "nothing", 0, 0)
    assert float(converted.norm.running_var.sum()) != float(make(Keeping).norm.running_var.sum())


class TestBadInput:
    @pytest.mark.parametrize("case", list(_BAD))
    def test_is_told_in_one_sentence_before_anything_is_changed(self, case: str) -> None:
        settings, error, message = _BAD[case]
        model = settings.get("model", make())
        before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
        with pytest.raises(error, match=message) as raised:
            run(**{"model": model, **{name: value for name, value in settings.items() if name != "model"}})
        assert str(raised.value).startswith("compress: ")
        assert not before or same_state(model, before)

    @pytest.mark.parametrize(
        ("make", "message"), [(lambda: Net().to("meta"), "on the meta device"), (lambda: nn.LazyLinear(4), "not initialized yet")]
    )
    def test_weights_without_values(self, make: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(PreparationError, match=f"compress: '.*' is {message}"):
            run(make())

    def test_nan_in_a_later_batch(self) -> None:
        data = batches()
        data[4] = data[4] * float("nan")
        with pytest.raises(ValueError, match="output output is not finite"):
            run(data=data)

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reading, "_free_bytes", lambda device: 1000)
        with pytest.raises(PreparationError, match=r"GiB of memory are needed beside the model and 0\.00 are free on cpu"):
            run()

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = make()
        model.stuck = (each for each in ())  # a generator
        with pytest.raises(DiffQError, match="cannot be copied"):
            run(model)


def test_one_copy_of_the_weights_is_left_once_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def counting(*args: object) -> None:
        alive.append(sum(type(each) is nn.Parameter and each.shape == (64, 16) for each in gc.get_objects()))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "seek_bits", counting)
    model = make()
    gc.collect()
    before = sum(type(each) is nn.Parameter and each.shape == (64, 16) for each in gc.get_objects())
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model)
    finally:
        gc.enable()
    assert alive == [before + 1]


class Tables(Net):
    """Two tables before a classifier; the gradient of one is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.users = nn.EmbeddingBag(40, 8, sparse=True), nn.Embedding(20, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.cat([self.items(ids), self.users(ids[:, 0] % 20)], 1))


def test_a_table_with_sparse_gradients_stays_as_it_is() -> None:
    model = make(Tables)
    converted = compress(model, [torch.randint(40, (12, 3)) for _ in range(4)], DiffQConfig(target_bits=6), steps=6)
    assert torch.equal(converted.get_parameter("items.weight"), model.get_parameter("items.weight"))
    assert "users.weight" in {weight.name for weight in bits_report(converted).weights}
    assert not torch.equal(converted.get_parameter("last.bias"), model.get_parameter("last.bias"))


def test_endless_batches_are_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless():
        while True:
            yield _X

    monkeypatch.setattr(reading, "_MOST_BATCHES", 5)
    assert re.search("4 batches and 1 held out", run(data=endless()).compression.notes[-1])


def test_the_bar_tells_the_stages(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a file is shown no bar
    run(progress=True)
    shown = capfd.readouterr()
    assert "tuning" in shown.err or "converting" in shown.err
    assert not shown.out
