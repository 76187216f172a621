"""The zoo: every model, in one list."""

from zoo import control_flow, hugging_face, sequence, vision
from zoo.entry import Entry

ZOO: list[Entry] = [*vision.ENTRIES, *sequence.ENTRIES, *control_flow.ENTRIES, *hugging_face.ENTRIES]

_ALSO_BY_MODULES = [*sequence.ENTRIES, *(entry for entry in vision.ENTRIES if "net" not in entry.name or "unet" in entry.name)]

BOTH_SCOPES: list[Entry] = ZOO + [entry.in_module_scope() for entry in _ALSO_BY_MODULES if entry.scope == "model"]
"""The zoo, and a second time in module scope what reads its weights in some way of its own."""

MORE_OF_A_KIND = frozenset(
    "gpt2 qwen2 modernbert deit wav2vec2 t5 whisper efficientnet shufflenetv2 densenet seresnet18 resnet18".split()
    + [entry.name for entry in BOTH_SCOPES if entry.name.endswith("-module")]
)
"""Models that train and convert as others here do: the gate only prepares them, `make evidence` does the rest."""

BY_NAME = {entry.name: entry for entry in BOTH_SCOPES}
