"""Where the bits went: per weight its widths and sizes, what was skipped and why, as table, text, dict and picture.

Importing this needs torch alone; rich and matplotlib are imported by the methods that draw with them.
"""

from diffq_fx.report.collect import bits_report
from diffq_fx.report.numbers import SizeParts, WeightBits
from diffq_fx.report.views import BitsReport

__all__ = ["BitsReport", "SizeParts", "WeightBits", "bits_report"]
