"""The callback for transformers' Trainer."""

import json
import sys
from typing import Any

from torch import nn

from diffq_fx.arguments import check_flags
from diffq_fx.convert import convert
from diffq_fx.errors import missing
from diffq_fx.integrations.schedule import begin, keep_losses, progress

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ImportError as error:
    raise missing("transformers", error) from error

_NAME = "DiffQTrainerCallback"


class DiffQTrainerCallback(TrainerCallback, ExportableState):
    """Tells a prepared model how long its training is, and the Trainer's loggers how far it is.

    - ``training_steps`` is the Trainer's ``max_steps`` where the config left it open.
    - Every log has ``diffq/bits`` (a weight), ``diffq/mib`` (the model's size), ``diffq/phase`` (0: noise, 1: final bits) and
      ``diffq/lambda`` (loss that the last MiB is worth), in all loggers.
    - A training that would end in the noise phase is warned of when it begins.

    Args:
        convert_at_end: whether to convert the model after the last step; ``converted`` is the result.

    Raises:
        PreparationError: when the training begins: the model is not prepared, or the checkpoint is of another configuration.
        ValueError: then, too: the Trainer has two of them, or an optimizer that was built before the model was prepared.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> callback = DiffQTrainerCallback(convert_at_end=True)  # Trainer(prepared, args, callbacks=[callback], ...)
    """

    converted: nn.Module | None = None

    def __init__(self, convert_at_end: bool = False) -> None:
        check_flags(_NAME, convert_at_end=convert_at_end)
        self.convert_at_end = convert_at_end
        self.settings: Any = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the callback."""
        return {"args": {"convert_at_end": self.convert_at_end}, "attributes": {"settings": self.settings}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check, plan and warn."""
        self._go_first()
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        kept = state.stateful_callbacks.get(_NAME) if state.global_step else None
        resumed = kept["attributes"]["settings"] if isinstance(kept, dict) else None
        settings = begin(_NAME, model, [optimizer] if optimizer else [], state.max_steps - state.global_step, resumed=resumed)
        self.settings = json.loads(json.dumps(settings))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add how far the bits are."""
        if logs is None or self.settings is None:
            return
        found = progress(kwargs["model"])
        keep_losses(kwargs["model"], logs)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Convert, if asked."""
        if self.convert_at_end:
            self.converted = convert(kwargs["model"])

    def _go_first(self) -> None:
        """Go before the Trainer's loggers, which come first: what is added to a log after they have seen it reaches none of them.

        A callback is not told who calls it, so the caller is looked for.
        """
        frame = sys._getframe(1)
        while frame is not None and not isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        if frame is None:
            return
        callbacks = handler.callbacks
        if (count := sum(isinstance(each, DiffQTrainerCallback) for each in callbacks)) > 1:
            raise ValueError(f"{_NAME}: the Trainer has {count} of them; give it one.")
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))  # those that it has yet to call keep their places
