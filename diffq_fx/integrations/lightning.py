"""Lightning: a callback that plans the training of a prepared model and logs its bits. Needs lightning or pytorch_lightning."""

from typing import Any

from torch import nn

from diffq_fx.arguments import check_flags
from diffq_fx.convert import convert
from diffq_fx.errors import missing
from diffq_fx.integrations.schedule import begin, keep_losses, progress

try:
    from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]
except ImportError as error:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing("lightning", error) from error


class DiffQCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """Tells the prepared models of a LightningModule how long their training is, and the loggers and the progress bar how far it is.

    - ``training_steps`` is what the Trainer estimates (``estimated_stepping_batches``) where the config left it open.
    - Every ``log_every_n_steps`` steps ``diffq/bits`` (a weight) and ``diffq/mib`` (the model's size) are shown in the progress bar and
      logged, with ``diffq/phase`` (0: noise, 1: final bits) and ``diffq/lambda`` (loss that the last MiB is worth).
    - A training that would end in the noise phase is warned of when it begins.

    Automatic and manual optimization are the same to it.

    Args:
        convert_at_end: whether to convert the LightningModule after the last step; ``converted`` is the result.

    Raises:
        PreparationError: when the training begins: no part of the module is prepared, or the checkpoint is of another configuration.
        ValueError: then, too: an optimizer was built before the model was prepared.

    Example:
        >>> callback = DiffQCallback(convert_at_end=True)  # Trainer(max_epochs=3, callbacks=[callback])
    """

    converted: nn.Module | None = None

    def __init__(self, convert_at_end: bool = False) -> None:
        check_flags("DiffQCallback", convert_at_end=convert_at_end)
        self.convert_at_end = convert_at_end
        self._settings: Any = None
        self._resumed: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the compression."""
        return {"settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember of what the checkpoint is."""
        self._resumed = state_dict["settings"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, plan and warn."""
        left = trainer.estimated_stepping_batches - _steps_of(trainer)
        resumed, self._resumed = self._resumed, None  # of this fit alone
        self._settings = begin("DiffQCallback", pl_module, trainer.optimizers, left, resumed=resumed)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log how far the bits are."""
        if batch_idx == 0 or _steps_of(trainer) % max(trainer.log_every_n_steps, 1) == 0:  # pyright: ignore[reportAttributeAccessIssue]
            keep_losses(pl_module, trainer.callback_metrics)
            for name, value in progress(pl_module).items():
                pl_module.log(name, value, prog_bar=name in ("diffq/bits", "diffq/mib"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, if asked."""
        if self.convert_at_end:
            self.converted = convert(pl_module)


def _steps_of(trainer: Trainer) -> int:
    """Steps so far; Lightning counts those of every optimizer."""
    return trainer.global_step // max(len(trainer.optimizers), 1)
