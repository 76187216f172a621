"""What other libraries have to know of prepared and converted models, so that they handle them right or not at all."""

import importlib
import sys
from contextlib import suppress

from torch import nn


def tell_libraries(model: nn.Module) -> None:
    """See to what transformers' ``save_pretrained`` and torchao's fake quantization will do with a prepared or converted model.

    Neither is imported for this: whoever has a model of transformers, or is about to call torchao, has imported it.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library and any(isinstance(module, library.PreTrainedModel) for module in model.modules()):
        importlib.import_module("diffq_fx.integrations.hf_folders").tell(model)
    if "torchao.quantization.qat" in sys.modules:
        with suppress(ImportError):  # a torchao of another version
            importlib.import_module("diffq_fx.integrations.torchao")
