"""What a converted model holds in place of its float weights: one class per kind of storage."""

from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.storage.footprint import Footprint
from diffq_fx.storage.integers import IntegerWeight
from diffq_fx.storage.stored_weight import StoredWeight

__all__ = ["CodebookWeight", "Footprint", "IntegerWeight", "StoredWeight"]
