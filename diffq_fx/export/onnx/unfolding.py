"""A copy of a file whose weights onnxruntime does not fold: they are made in float when they are read, one after the other.

onnxruntime (1.31) needs three to four times the size of what it folds while it does so, and holds all of it afterwards.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

UNFOLDED = "unfolded/"
"""So begin the names of the nodes that are computed at every run for this reason."""
FREED: Mapping[str, Any] = {"enable_cpu_mem_arena": False, "enable_mem_pattern": False}
"""Options of a session that give back what a run has taken."""


def save_unfolded(path: Path, weights: Iterable[str], folder: Path) -> Path:
    """Write a file anew with the initializers of some weights as the defaults of optional inputs, which are no constants to onnxruntime.

    Its functions are inlined here: onnxruntime would run what it inlines itself before everything else, and all weights were there at once.
    The tensors lie outside of the graph, since onnxruntime maps these into memory and copies others twice.
    """
    model = ir.load(path)
    InlinePass()(model)
    initializers, begins = model.graph.initializers, tuple(f"{weight}." for weight in weights)
    unfolded = {value for name, value in initializers.items() if name.startswith(begins)}
    known = {None, *initializers.values()}
    model.graph.inputs.extend(unfolded)
    for node in model.graph:
        if known.issuperset(node.inputs):
            known.update(node.outputs)
            if not unfolded.isdisjoint(node.inputs):
                unfolded.update(node.outputs)
                node.name = f"{UNFOLDED}{node.outputs[0].name}"
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / path.name, external_data="unfolded.data")
    return folder / path.name
