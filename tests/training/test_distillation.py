"""A teacher of the prepared model: with weights of its own, no part of the model, and the loss between outputs of any structure."""

import copy
import dataclasses
import pickle
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from diffq_fx import DiffQConfig, Distillation, PreparationError, convert, prepare, prepare_diffq
from diffq_fx.example import Example
from diffq_fx.methods import LSQ
from diffq_fx.training import output_loss as output_loss_module
from diffq_fx.training.output_loss import output_loss, scores_among

X = torch.linspace(-1, 1, 16 * 32).view(16, 32).sin()


def make_net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 8))


def make(net=None, scope="auto", **settings):
    return prepare_diffq(
        make_net() if net is None else net, X[:2], DiffQConfig(**{"target_bits": 4.5, "training_steps": 40, **settings}), scope=scope
    )


def train(model, distill, steps=30, accumulated=1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(1, steps * accumulated + 1):
        distill(X, model(X)).div(accumulated).backward()
        if step % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()


class InAList(nn.Module):
    """Holds a model out of sight of parameters()."""

    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, x):
        return self.models[0](x)


class TiedHead(nn.Module):
    """Has layers of its own, and one weight of another model."""

    def __init__(self, model):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 8)
        self.last.weight = model[3].weight

    def forward(self, x):
        return self.last(self.first(x))


class Views(nn.Module):
    """Has the values of another model in a buffer."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("weight", model[0].weight.data[:8])

    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize(
    "of",
    [lambda net, model: None, lambda net, model: net, lambda net, model: model, lambda net, model: InAList(net)],
    ids=["default", "the model", "the prepared model", "in a list"],
)
def test_a_teacher_that_shares_weights_is_a_copy_of_the_float_model(of, scope):
    net = make_net()
    expected = net.eval()(X)
    model = make(net, scope)
    distill = Distillation(model, of(net, model))
    train(model, distill)
    assert not torch.equal(net.eval()(X), expected)  # it trains along with the prepared model
    assert torch.equal(distill.teacher(X), expected)
    assert not any(parameter.requires_grad for parameter in distill.teacher.parameters())


@pytest.mark.parametrize("wrapper", [TiedHead, Views])
def test_one_shared_weight_is_enough_to_copy(wrapper):
    net = make_net()
    teacher = wrapper(net)
    model = make(net)
    expected = teacher(X)
    distill = Distillation(model, teacher)
    train(model, distill)
    assert not torch.equal(teacher(X), expected)
    assert torch.equal(distill.teacher(X), expected)


def test_a_teacher_of_its_own_is_not_copied_and_not_changed():
    teacher = make_net(dropout=0.5).train()
    teacher[0].eval()
    model = make()
    distill = Distillation(model, teacher)
    assert distill.teacher is teacher
    before = copy.deepcopy(teacher.state_dict())
    train(model, distill, steps=3)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert [module.training for module in teacher.modules()] == [True, False, *[True] * 3]
    assert torch.equal(distill._answers(Example.of(X)), teacher.eval()(X))  # without dropout


def test_a_model_that_has_trained_is_no_teacher():
    net = make_net()
    model = make(net)
    train(model, Distillation(model), steps=2)
    for teacher in (None, net):
        with pytest.raises(PreparationError, match="has trained for 2 steps"):
            Distillation(model, teacher)
    Distillation(model, make_net())  # has weights of its own


def test_the_teacher_is_no_part_of_the_model():
    model = make()
    state, parameters, pickled = set(model.state_dict()), len(list(model.parameters())), len(pickle.dumps(model))
    distill = Distillation(model)
    assert set(model.state_dict()) == state
    assert len(list(model.parameters())) == parameters
    assert len(pickle.dumps(model)) == pickled
    model.distill = distill
    assert copy.deepcopy(model).distill.teacher is distill.teacher
    train(model, distill, steps=1)
    assert len(pickle.dumps(convert(model).state_dict())) < pickled  # and no teacher among what is converted
    torch.testing.assert_close(pickle.loads(pickle.dumps(distill))(X, model.eval()(X)), distill(X, model(X)))


def test_its_memory_is_that_of_the_float_weights_and_a_step_is_one_forward_more():
    model = make()
    distill = Distillation(model)
    tensors = [*distill.teacher.parameters(), *distill.teacher.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) == sum(parameter.nbytes for parameter in make_net().parameters())
    calls = []
    distill.teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train(model, distill, steps=3, accumulated=2)
    assert calls == [False] * 6


def test_only_the_student_drops_out():
    model = make(make_net(dropout=0.5))
    distill = Distillation(model)
    train(model, distill, steps=2)
    first, second = (distill(X, distill.teacher(X)) for _ in range(2))
    assert first == second == 0
    assert distill(X, model.train()(X)) != distill(X, model(X))


def test_distilling_beats_the_rounded_start():
    model = make(target_bits=2.6)
    distill = Distillation(model)
    with torch.no_grad():
        before = distill(X, model.eval()(X))
    train(model, distill, steps=40)
    assert distill(X, model.eval()(X)) < before / 2


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_in_several_processes(process_group):
    wrapped = nn.parallel.DistributedDataParallel(make())
    distill = Distillation(wrapped)
    train(wrapped, distill, steps=3, accumulated=2)
    assert torch.equal(distill.teacher(X), make_net().eval()(X))
    model = make()
    distill = Distillation(model)
    fully_shard(model)
    train(model, distill, steps=3)
    assert torch.equal(distill.teacher(X), make_net().eval()(X))
    sharded = make()
    fully_shard(sharded)
    with pytest.raises(PreparationError, match="is sharded over ranks"):
        Distillation(sharded)


def test_any_method_has_a_teacher():
    model = prepare(make_net(), X[:2], LSQ(bits=3))
    distill = Distillation(model)
    expected = distill.teacher(X)
    train(model, distill, steps=2)
    assert torch.equal(expected, make_net().eval()(X))


def test_a_convolution_with_batch_norm_keeps_the_statistics_of_the_teacher():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
    images = torch.randn(4, 3, 8, 8)
    model = prepare_diffq(net, images[:2], DiffQConfig(target_bits=5))
    distill = Distillation(model)
    for _ in range(2):
        distill(images, model.train()(images)).backward()
    assert not torch.equal(model[1].running_mean, torch.zeros(16))
    assert torch.equal(distill.teacher[1].running_mean, torch.zeros(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_float32(dtype):
    model = make()
    distill = Distillation(model, kind="scores")
    with torch.autocast("cpu", dtype=dtype):
        outputs = model.train()(X)
        loss = distill(X, outputs)
    assert (outputs.dtype, loss.dtype) == (dtype, torch.float32)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


Scores = namedtuple("Scores", "logits extra")


@dataclasses.dataclass
class Outputs:
    loss: torch.Tensor
    logits: torch.Tensor
    cache: object = None


LOGITS = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 1.0, 5.0]], [[2.0, -1.0, 0.5], [9.0, 0.0, 0.0]]])
MASK = torch.tensor([[1, 1], [1, 0]])


@pytest.mark.parametrize(
    "structure",
    [
        lambda logits: {"loss": logits.sum(), "logits": logits, "features": logits.exp(), "past_key_values": (logits,)},
        lambda logits: Outputs(logits.mean(), logits),
        lambda logits: Scores(logits, logits * 3),
        lambda logits: ({"head_logits": logits}, logits + 1),
    ],
    ids=["dict", "dataclass", "named tuple", "nested"],
)
@pytest.mark.parametrize("mask", [None, MASK, MASK[1]], ids=["all", "of tokens", "of samples"])
def test_class_scores_are_found_by_name(structure, mask):
    teacher = LOGITS.flip(0) / 2
    found = output_loss(structure(LOGITS), structure(teacher), temperature=3.0, mask=mask)
    p, q = F.softmax(teacher / 3, -1), F.softmax(LOGITS / 3, -1)
    rows = 9 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(found, rows.mean() if mask is None else rows[mask.bool()].mean())


@pytest.mark.parametrize("structure", [lambda a, b: (a, [b]), lambda a, b: {"a": a, "b": b, "ids": a.long()}], ids=["tuple", "dict"])
def test_features_are_compared_by_their_power(structure):
    a, b, c, d = torch.randn(4, 2, 2, 5).unbind(0)
    expected = ((a - c).square().sum() / c.square().sum() + (b - d).square().sum() / d.square().sum()) / 2
    torch.testing.assert_close(output_loss(structure(a, b), structure(c, d), scores=()), expected)
    keep = MASK.bool()
    torch.testing.assert_close(output_loss(a, c, scores=(), mask=MASK), (a - c)[keep].square().sum() / c[keep].square().sum())


def test_class_scores_without_a_name_are_those_whose_rows_choose():
    labels = torch.arange(12) % 4
    confident = 6 * F.one_hot(labels).float()
    outputs = {
        "confident": confident,
        "of images": confident.view(3, 4, 4, 1).transpose(1, 2),
        "all the same": confident[:1].expand(12, 4),
        "features": torch.randn(12, 4),
        "one": 9 * torch.randn(12, 1),
    }
    assert scores_among(outputs) == {"confident", "of images"}


def test_what_outputs_are_is_seen_once():
    model = make()
    distill, follow = Distillation(model), Distillation(model, kind="scores")
    model[3].weight.data.mul_(30)  # after the teacher was made
    wanted, outputs = distill.teacher(X), model.eval()(X)
    torch.testing.assert_close(distill(X, outputs), output_loss(outputs, wanted, scores=()))
    torch.testing.assert_close(follow(X, outputs), output_loss(outputs, wanted, scores={"output"}, temperature=4.0))


def test_what_is_padded_may_be_anything():
    student, teacher = LOGITS.clone().requires_grad_(), LOGITS / 2
    with torch.no_grad():
        student[1, 1] = float("nan")
    for scores in ({"output"}, ()):
        loss = output_loss(student, teacher, scores=scores, mask=MASK)
        (grad,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
        assert not grad[1, 1].any()
    assert output_loss(student, teacher, scores={"output"}, mask=torch.zeros(2, 2)) == 0  # a batch of nothing but padding


def test_scores_are_compared_in_pieces(monkeypatch):
    """As in one, to the bit where rows are alone in a piece, and the gradient keeps little beside the scores themselves."""
    scores, teacher = torch.randn(6, 7, 100, requires_grad=True), torch.randn(6, 7, 100)
    kept, found = {}, []
    for piece in (1 << 22, 250):
        monkeypatch.setattr(output_loss_module, "_PIECE", piece)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.setdefault(each.data_ptr(), each), lambda each: each):
            loss = output_loss(scores, teacher, scores=("output",), temperature=2.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, scores)))
        size = sum(each.numel() for each in kept.values())
    assert size <= scores.numel() + teacher.numel()
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)


def test_features_of_any_size_are_compared_alike():
    student, teacher = torch.randn(5, 8), torch.randn(5, 8)
    expected = (student - teacher).square().sum() / teacher.square().sum()
    for factor in (2.0**66, 2.0**-66):
        scaled = (student * factor).requires_grad_()
        loss = output_loss(scaled, teacher * factor, scores=())
        (grad,) = torch.autograd.grad(loss, scaled)
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(grad * factor, 2 * (student - teacher) / teacher.square().sum())


def test_classes_that_are_ruled_out_differ_by_nothing():
    student, teacher = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True), torch.tensor([[1.0, 1.0, -torch.inf]])
    loss = output_loss(student, teacher, scores={"output"})
    torch.testing.assert_close(loss, output_loss(student[:, :2], teacher[:, :2], scores={"output"}))
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_classes_of_images_are_channels_and_one_class_is_a_regression():
    student, teacher = torch.randn(2, 2, 5, 3, 3).unbind(0)
    torch.testing.assert_close(
        output_loss(student, teacher, scores={"output"}),
        output_loss(student.movedim(1, -1).flatten(0, -2), teacher.movedim(1, -1).flatten(0, -2), scores={"output"}),
    )
    one, other = student.reshape(-1, 1), teacher.reshape(-1, 1)
    torch.testing.assert_close(output_loss({"logits": one}, {"logits": other}), output_loss(one, other, scores=()))


def test_a_mask_among_the_inputs_is_used_where_it_fits():
    class Tokens(nn.Module):
        def __init__(self, pooled):
            super().__init__()
            self.pooled, self.embedding, self.head = pooled, nn.Embedding(8, 32), nn.Linear(32, 3)

        def forward(self, input_ids, attention_mask):
            logits = self.head(self.embedding(input_ids))
            return {"logits": logits.mean(1) if self.pooled else logits}

    for pooled in (False, True):
        batch = {
            "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        }
        model = prepare_diffq(Tokens(pooled), batch, DiffQConfig(target_bits=6)).eval()
        distill = Distillation(model)
        outputs, wanted = model(**batch), distill.teacher(**batch)
        mask = None if pooled else batch["attention_mask"]
        torch.testing.assert_close(distill(batch, outputs["logits"]), output_loss(outputs, wanted, temperature=4.0, mask=mask))


@pytest.mark.parametrize(
    ("outputs", "teacher", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"output has shape \(2, 3\), the teacher's has \(2, 4\)"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, "to compare are a; the teacher gives a, b"),
        (torch.ones(2).long(), torch.ones(2).long(), "to compare are no floating-point tensor"),
        (None, torch.ones(2), "to compare are no floating-point tensor; the teacher gives output"),
    ],
)
def test_outputs_that_are_not_the_teachers_are_refused(outputs, teacher, message):
    with pytest.raises(ValueError, match=message):
        output_loss(outputs, teacher)


def test_bad_settings_are_refused():
    model = make()
    with pytest.raises(PreparationError, match="Distillation: the Sequential is not prepared"):
        Distillation(make_net())
    with pytest.raises(TypeError, match="teacher must be a module or None, got function"):
        Distillation(model, lambda x: x)
    for settings, message in (
        ({"kind": "logits"}, "kind must be one of"),
        ({"temperature": 0}, "temperature must be"),
        ({"temperature": "4"}, "temperature must be a positive and finite number, got '4'"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(model, **settings)
    with pytest.raises(ValueError, match=r"the mask of shape \(3, 2\) is of no rows"):
        output_loss(LOGITS, LOGITS, mask=torch.ones(3, 2))


def test_a_mask_that_is_added_to_scores_says_what_counts_too():
    student, teacher = torch.randn(2, 2, 5, 7).unbind()
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    wanted = output_loss({"logits": student}, {"logits": teacher}, mask=kept)
    for added in (torch.finfo(torch.float32).min, -1e9, -torch.inf):
        mask = torch.zeros(2, 5).masked_fill(kept == 0, added)
        assert torch.equal(output_loss({"logits": student}, {"logits": teacher}, mask=mask), wanted)
    assert torch.equal(output_loss({"logits": student}, {"logits": teacher}, mask=kept.float()), wanted)


def test_a_teacher_that_says_nothing_but_zero():
    student = torch.full((4, 3), 0.5, requires_grad=True)
    loss = output_loss(student, torch.zeros(4, 3))
    loss.backward()
    assert float(loss) == pytest.approx(0.25)
    assert bool(torch.isfinite(student.grad).all())
