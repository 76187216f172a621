"""What transformers has to know of prepared and converted models, so that a folder that it writes is read right or not at all."""

import importlib
import sys

from torch import nn


def tell_transformers(model: nn.Module) -> None:
    """See to what ``save_pretrained`` of a prepared or converted model will write; does nothing for models that are not of transformers.

    transformers is not imported for this: whoever has a model of it has imported it.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library and any(isinstance(module, library.PreTrainedModel) for module in model.modules()):
        importlib.import_module("diffq_fx.integrations.hf_folders").tell(model)
