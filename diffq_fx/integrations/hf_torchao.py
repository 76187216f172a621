"""Models of transformers whose weights are torchao's tensors: what is to be known for ``save_pretrained``, ``from_pretrained`` and vLLM."""

from collections import OrderedDict
from typing import Any

from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import FqnToConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, MappingType
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from diffq_fx.integrations.hf_folders import say_nothing
from diffq_fx.storage import StoredWeight


class _TiedOnce(TorchAoHfQuantizer):
    """Writes a tied weight under one name: transformers compares what it finds under both, which torchao's tensors cannot do."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """The tensors to write, in pieces, and what says how to put them together."""
        tied = model.all_tied_weights_keys or {}
        return flatten_tensor_state_dict({name: tensor for name, tensor in model.state_dict().items() if name not in tied})


def tell(model: nn.Module) -> None:
    """Describe the weights in the configs of the models of transformers within, each by torchao's own config of its type.

    A model and its body share one config, which is of the model.
    """
    for module in reversed([*model.modules()]):
        if not isinstance(module, PreTrainedModel) or any(isinstance(each, StoredWeight) for each in module.modules()):
            continue
        named = module.named_parameters(remove_duplicate=False)
        weights = {name.removesuffix(".weight"): weight for name, weight in named if isinstance(weight, IntxUnpackedToInt8Tensor)}
        types = FqnToConfig(OrderedDict((name, _config_of(weight)) for name, weight in weights.items()))
        config = TorchAoConfig(types, include_input_output_embeddings=True)
        say_nothing(module.config)
        module.config.quantization_config = config
        vars(module)["hf_quantizer"] = _TiedOnce(config, pre_quantized=True)


def _config_of(weight: IntxUnpackedToInt8Tensor) -> IntxWeightOnlyConfig:
    group = weight.block_size[1]
    return IntxWeightOnlyConfig(
        weight_dtype=weight.target_dtype,
        granularity=PerGroup(group) if group < weight.shape[1] else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if weight.zero_point.any() else MappingType.SYMMETRIC,
        scale_dtype=weight.scale.dtype,
    )
