"""transformers: folders of converted models, and a callback for its Trainer. Needs the package transformers.

Importing this lets ``from_pretrained`` read what ``save_pretrained`` of a converted model wrote.
"""

from diffq_fx.integrations.hf_folders import PackedWeights

__all__ = ["PackedWeights"]
