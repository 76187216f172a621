"""Convert every model of the zoo: the result of eval(), no float weight left anywhere, and a model that can still be copied and used."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from diffq_fx import CompressionRecord, DiffQConfig, WeightQuantizer
from zoo.checks import MODES, assert_same, converted, prepared, reachable_tensors, run, tensors_in, trained
from zoo.entry import Entry, each_in_one_way, parameters_of
from zoo.models import BOTH_SCOPES, BY_NAME, MORE_OF_A_KIND

MODELS = parameters_of(BOTH_SCOPES, MORE_OF_A_KIND)
every_model = pytest.mark.parametrize("entry", MODELS)


@every_model
def test_computes_what_the_prepared_model_computes_in_eval(entry: Entry):
    model, result = trained(entry)
    assert not result.training
    for variant in (0, 1):
        assert_same(run(result, entry, "eval without grad", variant), run(model, entry, "eval without grad", variant))
        found, expected = (tensors_in(run(each, entry, "eval", variant)) for each in (result, model))
        for a, b in zip(found, expected, strict=True):  # not bitwise: matmul takes another kernel where a factor requires grad
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.detach().abs().max()) + 1e-6)
    assert isinstance(result.compression, CompressionRecord)
    assert result.compression.scope == entry.scope


@every_model
def test_holds_no_float_copy_of_a_weight(entry: Entry):
    model = trained(entry)[0]
    run(model, entry, "eval")
    floats, aliases = {}, set()
    for quantizer in model.compression.quantizers:
        weight = model.get_parameter(quantizer.spec.name).detach()
        floats[quantizer.spec.name] = [weight, quantizer.rounded_weight(weight)]
        aliases |= set(quantizer.spec.names)
    result = converted(model)
    for mode in MODES:  # nothing may come to be by use
        run(result, entry, mode)
    assert not {name for name, _ in result.named_parameters()} & aliases
    assert not [module for module in result.modules() if isinstance(module, WeightQuantizer)]
    found = list(reachable_tensors(result))
    assert {id(p) for p in result.parameters()} <= {id(t) for _, t in found}
    for path, tensor in found:
        for name, copies in floats.items():
            for weight in copies:
                assert not _holds(tensor, weight), f"{path} is a copy of {name}"


def _holds(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor, or the storage that it is a view of, has the values of a weight; a handful of equal numbers is chance."""
    if not tensor.is_floating_point() or tensor.is_meta or weight.unique().numel() < 4:
        return False
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.numel() >= weight.numel() and bool((whole[: weight.numel()] == weight.reshape(-1)).all())


@pytest.mark.parametrize(("entry", "way"), each_in_one_way(MODELS, ("deepcopy", "torch.save", "state_dict")))
def test_copies_compute_the_same(entry: Entry, way: str):
    result = trained(entry)[1]
    if way == "torch.save" and not entry.pickles:
        return
    twin = {"deepcopy": copy.deepcopy, "torch.save": _through_file, "state_dict": _through_state}[way](result)
    assert type(twin).__name__ == type(result).__name__
    assert list(twin.state_dict()) == list(result.state_dict())
    for mode in ("eval", "eval without grad"):
        assert_same(run(twin, entry, mode), run(result, entry, mode))
    assert twin.compression == result.compression


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_state(result: nn.Module) -> nn.Module:
    twin = copy.deepcopy(result)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict(result.state_dict())
    return twin


@every_model
def test_leaves_the_prepared_model_as_it_was(entry: Entry):
    model = trained(entry)[0]
    twin = copy.deepcopy(model)
    result = converted(model)
    mine = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    assert not mine & {t.untyped_storage().data_ptr() for t in [*result.parameters(), *result.buffers()] if t.numel()}
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
    assert_same(run(model, entry, "eval"), run(twin, entry, "eval"))
    assert_same(run(model, entry, "train"), run(twin, entry, "train"))
    again = converted(model)
    assert_same(run(again, entry, "eval"), run(converted(twin), entry, "eval"))


@pytest.mark.parametrize("name", ["transformer_encoder", "transformer", "transformer_encoder-module", "transformer-module"])
def test_the_fast_path_of_transformer_layers_runs_converted(name: str, monkeypatch: pytest.MonkeyPatch):
    calls = []
    fast_path = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast_path(*args))
    entry = BY_NAME[name]
    model = prepared(entry)
    counts = []
    for each in (entry.make(), model, converted(model), copy.deepcopy(converted(model))):
        calls.clear()
        run(each, entry, "eval without grad")
        counts.append(len(calls))
    assert counts[0] > 0
    assert counts == counts[:1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3_moe", "t5", "whisper"])
def test_generate_of_hugging_face_models_survives(name: str):
    entry = BY_NAME[name]
    model, result = trained(entry)
    model.eval()
    assert isinstance(result, type(entry.make()))
    first, *others = (
        {**each.config.to_dict(), "fusion_config": None} for each in (result, model, entry.make())
    )  # tells of a folder's weights
    assert others == [first, first]
    inputs = {key: value for key, value in entry.inputs(0).items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for use_cache in (False, True):
        found, expected = (each.generate(**inputs, **settings, use_cache=use_cache) for each in (result, model))
        assert torch.equal(found, expected)
        assert found.shape[-1] >= 5


@pytest.mark.parametrize("name", ["resnet20_cifar", "tests_its_mode", "lstm_lm", "bare_parameters"])
def test_half_precision_of_the_rest_is_what_half_can_hold(name: str):
    entry = BY_NAME[name]
    model = prepared(entry, config=DiffQConfig(penalty=1.0, rest_dtype="float16"))
    for parameter in converted(model).parameters():
        if parameter.dtype == torch.float32:
            assert torch.equal(parameter, parameter.half().float())
