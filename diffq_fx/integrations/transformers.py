"""transformers: folders of converted models, and a callback for its Trainer. Needs the package transformers.

Importing this lets ``from_pretrained`` read what ``save_pretrained`` of a converted model wrote.
"""

from diffq_fx.errors import why_too_old
from diffq_fx.integrations.hf_folders import NEEDED, PackedWeights
from diffq_fx.integrations.trainer import DiffQTrainerCallback

if _why := why_too_old("transformers", NEEDED):
    raise ImportError(f"diffq_fx.integrations.transformers {_why}.")

__all__ = ["DiffQTrainerCallback", "PackedWeights"]
