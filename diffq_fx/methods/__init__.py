"""Methods: what happens to a weight in training, how it is rounded, how it is stored; one file each."""

from diffq_fx.methods.base import Method, WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.learning_compression import LC
from diffq_fx.methods.lsq import LSQ
from diffq_fx.methods.product_quantization import ProductQuantization
from diffq_fx.methods.quant_noise import QuantNoise
from diffq_fx.methods.ste import STE

__all__ = ["LC", "LSQ", "STE", "DiffQConfig", "Method", "ProductQuantization", "QuantNoise", "WeightQuantizer"]
