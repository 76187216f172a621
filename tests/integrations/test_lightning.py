"""The callback for Lightning: automatic and manual optimization, logs, resume, conversion."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as lightning
from lightning.pytorch import callbacks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_summary import ModelSummary

from diffq_fx import DiffQConfig, DiffQWarning, PreparationError, bits_report, prepare_diffq
from diffq_fx.integrations.lightning import DiffQCallback
from diffq_fx.storage import StoredWeight

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
BATCHES = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)


class Lit(lightning.LightningModule):
    def __init__(self, manual=False, old_optimizer=False, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.optimizer = torch.optim.AdamW(self.net.parameters()) if old_optimizer else None
        self.net = prepare_diffq(self.net, X[:2], DiffQConfig(**settings))
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[0][:, :4].argmax(1))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return self.optimizer or torch.optim.AdamW(self.parameters(), 1e-2)


class Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None, **kwargs):
        self.seen.append(metrics)


def fit(module, *given, epochs=1, logger=False, checkpoint=None, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=logger,
            callbacks=list(given),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=2,
            **settings,
        )
        trainer.fit(module, BATCHES, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_the_length_is_taken_over_bits_are_logged_and_the_module_is_converted(manual):
    logger, callback = Logger(), DiffQCallback(convert_at_end=True)
    module = Lit(manual, target_bits=4)
    trainer = fit(module, callback, epochs=4, logger=logger)
    assert module.net.compression.config.training_steps == 48
    logs = [each for each in logger.seen if "diffq/bits" in each]
    assert [each["diffq/phase"] for each in logs] == [0] * 2 + [1] * 22, "5 of 48 steps have noise"
    assert {"diffq/bits", "diffq/mib"} <= trainer.progress_bar_metrics.keys()
    assert logs[-1]["diffq/bits"] == pytest.approx(bits_report(module).average_bits)
    assert [each for each in callback.converted.modules() if isinstance(each, StoredWeight)]
    assert torch.equal(callback.converted.net(X), module.net.eval()(X))


def test_automatic_and_manual_optimization_train_alike():
    automatic, manual = Lit(False, target_bits=4), Lit(True, target_bits=4)
    for module in (automatic, manual):
        torch.manual_seed(1)
        fit(module, DiffQCallback())
    for name, value in automatic.state_dict().items():
        assert torch.equal(value, manual.state_dict()[name]), name


def test_resume_is_the_same_training(tmp_path):
    class AtHalf(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            torch.manual_seed(trainer.current_epoch)

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(target_bits=4, checkpoint=None, callback=None):
        module = Lit(target_bits=target_bits)
        fit(module, callback or DiffQCallback(), AtHalf(), epochs=2, checkpoint=checkpoint)
        return module

    callback = DiffQCallback()
    whole, again = run(), run(checkpoint=tmp_path / "half.ckpt", callback=callback)
    assert int(again.net.compression.steps) == 24
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(PreparationError, match="another configuration: target_bits=4 for '\\*' there, 5 here"):
        run(target_bits=5, checkpoint=tmp_path / "half.ckpt")
    run(target_bits=5, callback=callback)  # a training from the start: the checkpoint of the last one is no matter


class Weights(lightning.Callback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.net.get_parameter("0.weight").detach().clone())


def test_an_average_of_the_weights_is_what_is_converted():
    weights, callback, module = Weights(), DiffQCallback(convert_at_end=True), Lit(target_bits=4)
    fit(module, callback, weights, callbacks.EMAWeightAveraging(decay=0.8), epochs=2)
    average = weights.seen[0]
    for each in weights.seen[1:]:
        average = 0.8 * average + 0.2 * each
    assert not torch.allclose(weights.seen[-1], average, atol=1e-3)
    torch.testing.assert_close(module.net.get_parameter("0.weight").data, average)
    assert bits_report(callback.converted).average_bits_in_all == pytest.approx(4, abs=0.05)
    assert torch.equal(callback.converted.net(X), module.net.eval()(X))


def test_stochastic_weight_averaging():
    callback, module = DiffQCallback(convert_at_end=True), Lit(target_bits=4)
    fit(module, callback, callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2), epochs=4)
    assert bits_report(callback.converted).average_bits_in_all == pytest.approx(4, abs=0.05)
    assert torch.equal(callback.converted.net(X), module.net.eval()(X))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_plugins(precision):
    callback, module = DiffQCallback(convert_at_end=True), Lit(target_bits=4)
    fit(module, callback, epochs=2, precision=precision)
    weight = module.net.get_parameter("0.weight")
    assert weight.dtype == {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    x = X.to(weight.dtype)
    assert torch.equal(callback.converted.net(x), module.net.eval()(x))
    assert bits_report(callback.converted).average_bits_in_all == pytest.approx(4, abs=0.05)


def test_accumulation_and_clipping_count_steps_of_the_optimizer():
    module = Lit(target_bits=4)
    fit(module, DiffQCallback(), epochs=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert int(module.net.compression.steps) == module.net.compression.config.training_steps == 24


def test_the_summary_has_the_names_of_the_layers():
    names = ModelSummary(Lit(target_bits=4), max_depth=3).layer_names
    assert names == ["net", "net.0", "net.0.weight_quantizer", "net.1", "net.2", "net.2.weight_quantizer"]


def test_a_schedule_that_does_not_fit_is_warned_of():
    with pytest.warns(DiffQWarning, match="DiffQCallback: this training ends in the noise phase.*it has 12 steps"):
        fit(Lit(target_bits=4, training_steps=1000), DiffQCallback())


def test_bad_input():
    float_module = Lit(target_bits=4)
    float_module.net = nn.Linear(16, 4)
    with pytest.raises(PreparationError, match="DiffQCallback: the Lit is not prepared"):
        fit(float_module, DiffQCallback())
    with pytest.raises(ValueError, match=r"bits of weight '0.weight': it was built before the model was prepared"):
        fit(Lit(old_optimizer=True, target_bits=4), DiffQCallback())
    with pytest.raises(RuntimeError, match="DiffQCallback"):
        fit(Lit(target_bits=4), DiffQCallback(), DiffQCallback())
