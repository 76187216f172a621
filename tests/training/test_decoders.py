"""What decoders are trained with, alone and together: checkpointing, bfloat16, LoRA, recompute_weights, FSDP2."""

import contextlib
import copy
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

import transformers

from diffq_fx import DiffQConfig, DiffQError, convert, freeze_bits, model_size, prepare, prepare_diffq, recompute_weights
from diffq_fx.functional.groups import to_rows
from diffq_fx.integrations.schedule import begin
from diffq_fx.methods import LSQ, STE
from diffq_fx.training import steps

IDS = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(0))
STEPS = 8
BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def prepared(model=None):
    return copy.deepcopy(_prepared_llama()) if model is None else _prepare(model)


@cache
def _prepared_llama():
    return _prepare(llama())


def _prepare(model):
    return prepare_diffq(model, {"input_ids": IDS}, DiffQConfig(target_bits=4, training_steps=STEPS)).train()


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def gradients(model, context=contextlib.nullcontext, loss=loss_of):
    model.zero_grad()
    torch.manual_seed(7)
    with context():
        value = loss(model)
    value.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def train(model, ids=IDS, context=contextlib.nullcontext):
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), 3e-3)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        with context():
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def checkpointed(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 calls it activation_checkpointing_enable too
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
    return model


LESS_KEPT = {
    "gradient_checkpointing_enable": (partial(checkpointed, use_reentrant=False), contextlib.nullcontext, loss_of),
    "reentrant": (partial(checkpointed, use_reentrant=True), contextlib.nullcontext, loss_of),
    "torch.utils.checkpoint": (
        lambda model: model,
        contextlib.nullcontext,
        lambda model: checkpoint(partial(loss_of, model), IDS, use_reentrant=False),
    ),
    "recompute_weights": (lambda model: model, recompute_weights, loss_of),
    "recompute_weights and checkpointing": (checkpointed, recompute_weights, loss_of),
}


@pytest.mark.parametrize(("change", "context", "loss"), LESS_KEPT.values(), ids=LESS_KEPT)
def test_what_keeps_less_has_the_same_gradients(change, context, loss):
    plain, frugal = prepared(), change(prepared())
    for _ in ("noise", "rounding"):
        expected, found = gradients(plain), gradients(frugal, context, loss)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        freeze_bits(plain)
        freeze_bits(frugal)


@contextlib.contextmanager
def recomputed_in_bfloat16():
    with BFLOAT16(), recompute_weights():
        yield


HALF = {
    "autocast": (llama, BFLOAT16),
    "autocast, checkpointing, recompute_weights": (lambda: checkpointed(llama()), recomputed_in_bfloat16),
    "a model in bfloat16": (partial(llama, torch.bfloat16), contextlib.nullcontext),
}


@pytest.mark.parametrize(("make", "context"), HALF.values(), ids=HALF)
def test_in_bfloat16_it_trains_holds_the_size_and_converts(make, context):
    model = prepared(make())
    losses = train(model, context=context)
    assert losses[-1] < losses[0] - 0.3
    assert model.compression.frozen
    assert all(logits.dtype == torch.float32 for logits in model.compression.logits)
    weights = sum(quantizer.spec.numel for quantizer in model.compression.learned)
    assert model_size(model, exact=True) <= (4 * weights + 32 * model.compression.rest_numel) / 8 / 2**20
    expected = logits_of(model)
    assert torch.equal(logits_of(convert(model)), expected)


@pytest.mark.parametrize("reentrant", [None, True], ids=["plain", "checkpointing"])
def test_lora_trains_adapters_and_the_bits_of_a_frozen_base(reentrant):
    base = llama()
    before = base.model.layers[0].mlp.down_proj.weight.detach().clone()
    model = with_lora(base)
    if reentrant is not None:
        checkpointed(model, use_reentrant=reentrant)
        model.enable_input_require_grads()
    model = prepared(model)
    start = torch.cat([logits.detach().flatten() for logits in model.compression.logits])
    losses = train(model)
    assert losses[-1] < losses[0]
    assert model.compression.frozen
    assert torch.cat([logits.flatten() for logits in model.compression.logits]).sub(start).abs().max() > 0
    assert torch.equal(base.model.layers[0].mlp.down_proj.weight, before)
    expected = logits_of(model)
    assert torch.equal(logits_of(convert(model)), expected)


def test_lora_absorbed_is_rounded_at_the_learned_bits():
    model = prepared(with_lora(llama()))
    train(model)
    apart = logits_of(model)
    model.merge_and_unload()
    absorbed = convert(model)
    assert not any("lora_" in name for name, _ in absorbed.named_parameters())
    assert not torch.equal(logits_of(absorbed), apart)
    assert torch.equal(logits_of(absorbed), logits_of(model))


def _error_of_the_absorbed(model, around):
    """Of a weight that an adapter was merged into, over that of plain rounding at 8 bits."""
    layer = around.base_model.model.model.layers[0].self_attn.q_proj
    quantizer = next(each for each in model.compression.quantizers if each.weight is layer.base_layer.weight)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
        wanted = layer.base_layer.weight + layer.get_delta_weight("default")
        around.merge_and_unload()
        plain = prepare(nn.Linear(64, 64), torch.zeros(1, 64), STE(bits=8)).compression.quantizers[0].rounded_weight(wanted)
        return float((quantizer.rounded_weight(quantizer.weight) - wanted).norm() / (plain - wanted).norm())


@pytest.mark.parametrize("method", [DiffQConfig(target_bits=8, training_steps=STEPS), LSQ(bits=8)], ids=["DiffQ", "LSQ"])
@pytest.mark.parametrize("order", ["adapter first", "final bits first"])
def test_ranges_that_were_learned_for_the_base_are_not_those_of_the_sum(method, order):
    if order == "adapter first":
        model = prepare(with_lora(llama()), {"input_ids": IDS}, method).train()
        around = model
    else:
        model = prepare(llama(), {"input_ids": IDS}, method).train()
        if isinstance(method, DiffQConfig):
            freeze_bits(model)
        around = with_lora(model)
    train(around)
    assert _error_of_the_absorbed(model, around) < 3  # some widths are 7 bits; with the ranges of the base it is above 40


def test_ranges_that_were_learned_beside_a_base_stay_without_a_merge():
    model = prepare(with_lora(llama()), {"input_ids": IDS}, LSQ(bits=3)).train()
    train(model)
    assert all(bool(quantizer.learned_for.any()) for quantizer in model.compression.quantizers)
    steps = [quantizer.step() for quantizer in model.compression.quantizers]
    reloaded = prepare(with_lora(llama()), {"input_ids": IDS}, LSQ(bits=3))
    reloaded.load_state_dict(model.state_dict())
    for quantizer, step in zip(reloaded.bfloat16().compression.quantizers, steps, strict=True):
        found = quantizer.params(to_rows(quantizer.weight.detach(), quantizer.spec.axis), quantizer.rounded_bits())
        assert torch.equal(found.scale, step)


def test_an_adapter_around_a_model_whose_bits_nothing_trains_is_refused(monkeypatch):
    monkeypatch.setattr(steps, "_PATIENCE", 3)
    model = with_lora(prepared())  # PEFT freezes all but its adapters: here the bits too
    with pytest.raises(DiffQError, match=r"(?s)bits do not move.*requires_grad=False.*prepare_diffq\(get_peft_model\("):
        train(model)
    with pytest.raises(ValueError, match=r"Trainer: The bits have requires_grad=False"):
        begin("Trainer", model, [], STEPS)
    optimizer = torch.optim.AdamW(model.parameters())  # at its first step: later its own steps would make the bits final
    loss_of(model, IDS).backward()
    with pytest.raises(DiffQError, match=r"(?s)an optimizer holds the bits .* neither bits nor weights train.*requires_grad=False"):
        optimizer.step()


def test_an_adapter_around_a_model_with_final_bits_trains(monkeypatch):
    monkeypatch.setattr(steps, "_PATIENCE", 3)
    base = prepared()
    train(base)
    expected = [quantizer.width.clone() for quantizer in base.compression.learned]
    model = checkpointed(with_lora(base), use_reentrant=False)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, expected, (quantizer.width for quantizer in base.compression.learned)))
    assert torch.equal(logits_of(convert(model)), logits_of(model))


POLICIES = {
    "float32": ({}, contextlib.nullcontext),
    "bfloat16": ({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}, contextlib.nullcontext),
    "autocast": ({}, BFLOAT16),
}


def _in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for name, (settings, context) in POLICIES.items():
            model = checkpointed(prepared())
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), **settings)
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **settings)
            losses = train(model, IDS[rank : rank + 1], context)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            torch.save({"losses": losses, "state": state, "logits": logits_of(model)}, Path(folder, f"{name}{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_with_checkpointing_and_bfloat16(tmp_path):
    torch.multiprocessing.spawn(_in_a_process, args=(str(tmp_path),), nprocs=2)
    for name in POLICIES:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        assert first["losses"][-1] + second["losses"][-1] < first["losses"][0] + second["losses"][0] - 0.6
        assert torch.equal(first["logits"], second["logits"])
        whole = prepared()
        whole.load_state_dict(first["state"])
        assert whole.compression.frozen
        found = logits_of(convert(whole))
        tolerance = 0.02 if name == "bfloat16" else 1e-5
        assert (found - first["logits"].float()).abs().max() <= tolerance * found.abs().max()
