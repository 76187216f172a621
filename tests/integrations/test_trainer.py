"""The callback for transformers' Trainer: length of the training, logs, warnings, resume, conversion."""

import json
import os
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from diffq_fx import DiffQConfig, DiffQWarning, PreparationError, bits_report, convert, prepare, prepare_diffq
from diffq_fx.integrations.transformers import DiffQTrainerCallback
from diffq_fx.methods import LSQ

IDS = torch.randint(67, (32, 6), generator=torch.Generator().manual_seed(0))


class Data(Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": IDS[index, 0] % 2}


class Logger(TrainerCallback):
    """Stands where Trainer has its own loggers: before the callbacks that users give."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture(autouse=True)
def _alone():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)  # which one test's bf16 would leave to the next


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(67, 32), nn.Linear(192, 2)

    def forward(self, input_ids, labels):
        logits = self.head(torch.relu(self.embed(input_ids)).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=67, max_position_embeddings=8
    )
    return BertForSequenceClassification(config)


EXAMPLE = {"input_ids": IDS[:2], "labels": IDS[:2, 0] % 2}


def prepared(method=None):
    return prepare(Net(), EXAMPLE, method or DiffQConfig(target_bits=4))


def trainer(model, folder, *callbacks, steps=12, optimizer=None, **settings):
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        **{"report_to": [], "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True, "dataloader_pin_memory": False, **settings},
    )
    return Trainer(model, args, train_dataset=Data(), callbacks=list(callbacks), optimizers=(optimizer, None))


def test_the_length_of_the_training_is_taken_over_and_everything_is_logged(tmp_path, capsys):
    logger, callback = Logger(), DiffQTrainerCallback(convert_at_end=True)
    model = prepare_diffq(bert(), {"input_ids": IDS[:2]}, DiffQConfig(target_bits=4))
    training = trainer(model, tmp_path, logger, callback)
    training.train()
    assert model.compression.config.training_steps == 12
    assert bits_report(model).notes == ()
    while_training = logger.seen[:-1]
    assert [log["diffq/phase"] for log in while_training] == [1] * 6, "a step of noise, then final bits"
    assert all({"diffq/bits", "diffq/mib", "diffq/lambda", "loss"} <= log.keys() for log in while_training)
    assert while_training == [{k: v for k, v in each.items() if k != "step"} for each in training.state.log_history[:-1]]
    assert logger.seen[-1]["diffq/bits"] == pytest.approx(bits_report(model).average_bits)
    assert logger.seen[-1]["diffq/mib"] == pytest.approx(bits_report(model).packed_size.total_mib)
    assert "diffq/bits" in capsys.readouterr().out, "what Trainer itself prints"
    curves = bits_report(callback.converted).curves
    assert [value for _, value in curves["loss"]] == [log["loss"] for log in while_training]
    assert [step for step, _ in curves["loss"]] == [2, 4, 6, 8, 10, 12]
    callback.converted.save_pretrained(tmp_path / "folder")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "folder")
    assert torch.equal(loaded(IDS).logits, model.eval()(input_ids=IDS).logits)
    assert bits_report(loaded).curves == curves


def test_a_schedule_that_does_not_fit_is_warned_of_at_the_start_and_at_the_end(tmp_path):
    model = prepared(DiffQConfig(target_bits=4, training_steps=1000))
    with pytest.warns(DiffQWarning, match=r"ends in the noise phase. .*after step 100 .*has 3 steps: prepare with training_steps=3"):
        trainer(model, tmp_path, DiffQTrainerCallback(), steps=3).train()
    with pytest.warns(DiffQWarning, match=r"convert: the training ended in the noise phase, after step 3;.*after step 100"):
        converted = convert(model)
    assert "in the noise phase after step 3" in bits_report(converted).notes[0]
    assert bits_report(model).notes == bits_report(converted).notes


def test_without_the_callback_convert_says_it(tmp_path):
    model = prepared()
    trainer(model, tmp_path, steps=2).train()
    with pytest.warns(DiffQWarning, match="ended in the noise phase, after step 2; the bits become final after step 200"):
        convert(model)


def test_methods_without_trained_bits(tmp_path):
    logger = Logger()
    model = prepared(LSQ(bits=4))
    trainer(model, tmp_path, logger, DiffQTrainerCallback(), steps=2).train()
    assert logger.seen[0]["diffq/mib"] > 0
    assert "diffq/phase" not in logger.seen[0]


def test_resume_is_the_same_training(tmp_path):
    def run(folder, steps, checkpoint=None):
        torch.manual_seed(0)
        model = prepared()
        trainer(model, folder, DiffQTrainerCallback(), steps=steps, save_strategy="steps", save_steps=6).train(checkpoint)
        return model

    whole = run(tmp_path / "a", 12)
    again = run(tmp_path / "b", 12, checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    kept = json.loads((tmp_path / "a" / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["DiffQTrainerCallback"]["attributes"]["settings"]
    with pytest.raises(PreparationError, match=r"another configuration: target_bits=4 for '\*' there, 5 here"):
        trainer(prepared(DiffQConfig(target_bits=5)), tmp_path, DiffQTrainerCallback()).train(str(tmp_path / "a" / "checkpoint-6"))


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True, "use_cpu": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:convert. the forward that was set on:diffq_fx.DiffQWarning")  # autocast ends with the training
def test_what_else_a_trainer_does(settings, tmp_path):
    callback = DiffQTrainerCallback(convert_at_end=True)
    model = prepare_diffq(bert(), {"input_ids": IDS[:2]}, DiffQConfig(target_bits=4))
    with mock.patch.dict(os.environ):  # where Trainer tells accelerate its settings
        trainer(model, tmp_path, callback, steps=6, **settings).train()
    assert int(model.compression.steps) == model.compression.config.training_steps == 6
    trained = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(callback.converted(input_ids=IDS).logits, trained.eval()(input_ids=IDS).logits)
    assert bits_report(callback.converted).average_bits_in_all == pytest.approx(4, abs=0.1)


def test_a_loop_of_accelerate_is_as_it_is_and_resumes(tmp_path):
    def run(steps, save=None, load=None):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = prepared(DiffQConfig(target_bits=4, training_steps=8))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
        if load:
            accelerator.load_state(load)
        for step in range(int(accelerator.unwrap_model(model).compression.steps), steps):
            torch.manual_seed(step)
            for rows in (IDS[:16], IDS[16:]):
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=rows, labels=rows[:, 0] % 2)["loss"])
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return accelerator.unwrap_model(model)

    whole = run(8)
    run(4, save=tmp_path / "half")
    again = run(8, load=tmp_path / "half")
    assert int(again.compression.steps) == 8
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(convert(again)(**EXAMPLE)["logits"], again.eval()(**EXAMPLE)["logits"])


def test_bad_input(tmp_path):
    with pytest.raises(PreparationError, match="DiffQTrainerCallback: the Net is not prepared"):
        trainer(Net(), tmp_path, DiffQTrainerCallback()).train()
    with pytest.raises(ValueError, match="the Trainer has 2 of them"):
        trainer(prepared(), tmp_path, DiffQTrainerCallback(), DiffQTrainerCallback()).train()
    net = Net()
    before = torch.optim.AdamW(net.parameters())
    model = prepare_diffq(net, EXAMPLE)
    with pytest.raises(ValueError, match="bits of weight 'embed.weight.*built before the model was prepared"):
        trainer(model, tmp_path, DiffQTrainerCallback(), optimizer=before).train()
    assert int(model.compression.steps) == 0
    assert model.compression.config.training_steps is None
