"""ONNX files on a whole test set."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from benchmarks.frontier.tasks import Task
from diffq_fx.export import session_options


def score_file(task: Task, path: Path, *, exact: bool | None = None) -> dict[str, float]:
    """Scores of a file: of ours with ``exact`` True (activations in float) or False (as it runs by default), None for anybody else's."""
    options: Any = onnxruntime.SessionOptions() if exact is None else session_options(path, exact=exact)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def predict(*inputs: Tensor) -> Tensor:
        feed = {name: each.contiguous().numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return task.evaluate(predict)
