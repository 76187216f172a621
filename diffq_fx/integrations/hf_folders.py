"""Folders of transformers: ``save_pretrained`` of a converted model, and ``from_pretrained`` that gives it back with its exact bits.

Import ``diffq_fx.integrations.transformers`` before ``from_pretrained``. In the folder every quantized weight is a uint8 tensor under its
own name: the bytes of a packed file that holds this weight alone (``docs/packed-format.md``), exact, near its entropy and checksummed.
Everything else is as transformers writes it, shards and tied weights included. config.json says what was compressed, and how.

transformers ignores a ``quant_method`` that it does not know, and fills up with random numbers what it does not find. So config.json also
asks for a fusion whose name is a sentence: transformers refuses one that it does not know, and says its name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from diffq_fx.capture.scope import TakenOver, take_over
from diffq_fx.convert import CompressionRecord
from diffq_fx.errors import PackedFileError, missing, why_too_old
from diffq_fx.export.onnx.files import blaming
from diffq_fx.export.packed.dtypes import FLOAT_TYPES
from diffq_fx.export.packed.loading import stored_weights_of
from diffq_fx.export.packed.reader import in_threads
from diffq_fx.export.packed.writer import model_contents, packed
from diffq_fx.hub import tell_libraries
from diffq_fx.integrations.method_json import record_of_json, record_to_json
from diffq_fx.parts import CHILD, parts_of
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import STORED_SUFFIX, names_of, owner_of

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise missing("transformers", error) from error

METHOD, _CONFIG = "diffq_fx", "config.json"
NEEDED = "5.23"
"""The first version of transformers that asks for the tensors to write and reads the config of a folder by what is registered here."""
_VERSION = 1
_CONVERTED = (
    f"{METHOD}: the weights of this folder are compressed. Install diffq-fx and transformers {NEEDED} or newer, and import "
    "diffq_fx.integrations.transformers first"
)
_PREPARED = (
    f"{METHOD}: this folder holds a training that is not finished. Resume it with Trainer, or load_state_dict into a prepared model; "
    "what from_pretrained reads is written by diffq_fx.convert(model).save_pretrained(folder)"
)


class PackedWeights(QuantizationConfigMixin):
    """``quantization_config`` in config.json: which tensors are packed weights, and what the model remembers of its compression.

    Args:
        weights: bytes of each packed weight, by its name in the model.
        records: what each part of the model that was converted remembers, by the part's path.
        dtype: the type of the model, by its name in torch.
        version: of this description.
    """

    def __init__(
        self,
        weights: Mapping[str, int] | None = None,
        records: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        version: Any = _VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if version != _VERSION:
            raise PackedFileError(f"the folder has the version {version!r} of diffq_fx; this diffq_fx reads version {_VERSION}.")
        FLOAT_TYPES.parse(dtype)
        self.quant_method: Any = quant_method
        self.version, self.dtype = version, dtype
        self.weights, self.records = dict(weights or {}), dict(records or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of config.json, which somebody else may have written."""
        with blaming(_CONFIG):
            return super().from_dict(config_dict, *args, **kwargs)


class PackedWeightsQuantizer(HfQuantizer):
    """What transformers asks while it writes or reads a converted model."""

    quantization_config: PackedWeights

    @property
    def is_trainable(self) -> bool:
        """What is not compressed can train, and adapters can."""
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse a folder of float weights: nothing is compressed here."""
        if not self.pre_quantized:
            raise PackedFileError(
                "from_pretrained: the folder holds no weights that diffq_fx compressed. Load it without quantization_config, prepare, "
                "train and convert the model, and save that."
            )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` can write the model; called before it writes anything."""
        if why := why_too_old("transformers", NEEDED):
            raise PackedFileError(f"save_pretrained {why}.")
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to write: packed weights under their own names, and the rest."""
        try:
            weights, rest = model_contents(model)
            specs = [stored for _, stored in weights]
            blobs = [b"".join(packed([stored], [], entropy=True)) for stored in specs]
        except PackedFileError as error:
            raise PackedFileError(f"save_pretrained: {error}. Save the model that convert returned.") from error
        ours = {stored.spec.name: torch.frombuffer(bytearray(blob), dtype=torch.uint8) for stored, blob in zip(specs, blobs, strict=True)}
        description = self.quantization_config
        description.weights = {name: len(tensor) for name, tensor in ours.items()}
        description.dtype = str(_dtype_of(model)).removeprefix("torch.")
        model.config.quantization_config = description
        vars(model)["_weight_conversions"] = []  # these are names of the model, and packed weights cannot be split or merged
        return ours | {names[0]: tensor for names, tensor in rest}, {}

    def update_attn_implementation(self, config: Any) -> Any:
        """Say nothing to those without diffq_fx: transformers is about to look at the config."""
        say_nothing(config)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any) -> None:
        """Put a tensor for its bytes in the place of each weight that is packed in the folder."""
        if checkpoint_files:
            self._refuse_incomplete(model, checkpoint_files)
        self._dtype = _dtype_of(model)  # that which the call asks for
        self._names: list[str] = []
        sizes = self.quantization_config.weights
        packed = {name: sizes[saved] for saved, name in _names_in(model, sizes).items() if name}  # a head may be none of this class
        for name, weight in list(model.named_parameters(remove_duplicate=False)):
            if (size := packed.get(name)) is None:
                continue
            blob = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
            self._names.append(name)
            for each in names_of(model, weight):
                owner, attribute = owner_of(model, each)
                owner._parameters[attribute] = blob

    def _refuse_incomplete(self, model: PreTrainedModel, files: list[str]) -> None:
        found: dict[str, list[int]] = {}
        for path in files:
            with safetensors.safe_open(path, "pt") as file:
                found.update({name: file.get_slice(name).get_shape() for name in file.keys()})
        lost = [name for name, size in self.quantization_config.weights.items() if found.get(name) != [size]]
        if type(model).__name__ in (model.config.architectures or ()):  # another class has a head of its own
            tied = [pair for pair in (model.all_tied_weights_keys or {}).items() if not found.keys().isdisjoint(pair)]
            there = found.keys() | {name for pair in tied for name in pair}
            may_lack = re.compile("|".join(f"({each})" for each in model._keys_to_ignore_on_load_missing or ()) or "(?!)")
            lost += [name for name in model.state_dict() if name not in there and not may_lack.search(name)]
        if lost := sorted({*lost}):
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            raise PackedFileError(f"from_pretrained: tensor {', '.join(map(repr, lost[:5]))}{more} is not whole in the folder.")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Make stored weights of the bytes."""
        blobs = [(names_of(model, blob), blob) for blob in map(model.get_parameter, self._names)]
        owned: dict[nn.Module, list[str]] = {}
        for names, stored in in_threads(lambda each: (each[0], _unpacked(*each)), blobs):
            device = model.get_parameter(names[0]).device
            stored.spec = replace(stored.spec, name=names[0], aliases=tuple(names[1:]))
            if self._dtype != FLOAT_TYPES[self.quantization_config.dtype]:
                stored = stored.to(self._dtype)
            for owner, attribute in (owner_of(model, name) for name in names):
                owner._modules[attribute + STORED_SUFFIX] = stored.to(device).eval()
                owned.setdefault(owner, []).append(attribute)
        for owner, attributes in owned.items():
            for attribute in dict.fromkeys(attributes):
                del owner._parameters[attribute]
            take_over(owner, TakenOver(weights=tuple(dict.fromkeys(attributes)), owned=tuple(dict.fromkeys(attributes))))
        with blaming(_CONFIG):
            self._set_records(model)
        vars(model)["is_quantized"] = False  # for transformers that is: cannot be trained, nor changed to another type
        tell_libraries(model)
        return model

    def _set_records(self, model: PreTrainedModel) -> None:
        if not self.quantization_config.records:
            raise ValueError("it has no records")
        for path, record in self.quantization_config.records.items():
            if (name := _names_in(model, [path])[path]) is not None:
                part = model.get_submodule(name)
                object.__setattr__(part, CHILD, record_of_json(record, part))


register_quantization_config(METHOD)(PackedWeights)
register_quantizer(METHOD)(PackedWeightsQuantizer)


def tell(model: nn.Module) -> None:
    """Prepare the models of transformers within a prepared or converted one for ``save_pretrained``."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if any(isinstance(each, StoredWeight) for each in module.modules()):
            vars(module)["hf_quantizer"] = PackedWeightsQuantizer(PackedWeights(records=_records_for(module, model)))
            _say(module.config, _CONVERTED)
        else:
            _say(module.config, _PREPARED)


def _records_for(module: nn.Module, model: nn.Module) -> dict[str, Any]:
    """The records of the converted parts within a module; for a piece of one that of the whole."""
    own = {path: record_to_json(vars(part)[CHILD]) for path, part in parts_of(module, CompressionRecord).items()}
    if own:
        return own
    around = next(vars(part)[CHILD] for part in parts_of(model, CompressionRecord).values() if module in [*part.modules()])
    return {"": record_to_json(replace(around, skipped=()))}


def say_nothing(config: Any) -> None:
    """Take the sentence for those without diffq_fx off a config."""
    _say(config, "")


def _say(config: Any, sentence: str) -> None:
    others = {name: value for name, value in (getattr(config, "fusion_config", None) or {}).items() if not name.startswith(METHOD)}
    if sentence:
        others[sentence] = True
    if others:
        config.fusion_config = others
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


def _names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str | None]:
    """What parameters or modules of the saved model are called in one that may be of another class: with or without a head around it."""
    prefix = model.base_model_prefix
    known = {each for each, _ in (*model.named_parameters(remove_duplicate=False), *model.named_modules(remove_duplicate=False))}
    ways = {name: (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) for name in names}
    return {name: next((each for each in candidates if each in known), None) for name, candidates in ways.items()}


def _unpacked(names: list[str], blob: Tensor) -> StoredWeight:
    try:
        (stored,) = stored_weights_of(np.asarray(blob.detach().cpu()).tobytes())
    except PackedFileError as error:
        raise PackedFileError(f"from_pretrained: weight {names[0]!r}: {error}.") from error
    return stored


def _dtype_of(model: nn.Module) -> torch.dtype:
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floats, torch.float32)
