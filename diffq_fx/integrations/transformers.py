"""transformers: folders of converted models, and a callback for its Trainer. Needs the package transformers.

Importing this lets ``from_pretrained`` read what ``save_pretrained`` of a converted model wrote.
"""

from diffq_fx.integrations.hf_folders import PackedWeights
from diffq_fx.integrations.trainer import DiffQTrainerCallback

__all__ = ["DiffQTrainerCallback", "PackedWeights"]
