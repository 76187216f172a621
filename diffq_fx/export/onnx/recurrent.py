"""LSTM and GRU stay whole while torch.export and torch.onnx look for shapes and types.

With a symbolic batch torch works them out cell by cell, several times over: a tenth of a second for each element of the sequence,
minutes for a second of sound. The graph has them whole in any case; only their shapes are asked for. (Plain RNN has no translation
to ONNX in torch and is cut up.)
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, fx

from diffq_fx import _compat
from diffq_fx.errors import ExportError


def _output_shape(input: Tensor, hidden: Tensor, bidirectional: bool) -> Tensor:
    return input.new_empty(*input.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1))


def _lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: ANN001, ANN202
    return _output_shape(input, hx[0], bidirectional), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: ANN001, ANN202
    return _output_shape(input, hx, bidirectional), torch.empty_like(hx)


_SHAPES = {torch.ops.aten.lstm.input: _lstm, torch.ops.aten.gru.input: _gru}


def recurrent_layers_whole() -> AbstractContextManager[None]:
    """Let torch find out what recurrent layers return without running them; for tracing alone, since the values are not worked out."""
    return _compat.shapes_without_running(_SHAPES)


def check_recurrent_layers(graph: fx.Graph) -> None:
    """Refuse what ONNX has no recurrent operator for.

    Raises:
        ExportError: an LSTM has projections, with its name and sizes.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            hidden, cell = (state.meta["val"].shape[-1] for state in node.args[1])
            if hidden != cell:
                raise ExportError(
                    f"{node.name}: an LSTM with projections (proj_size={hidden}, hidden_size={cell}), and the LSTM of ONNX has none. "
                    "Use an LSTM without proj_size and a Linear layer behind it."
                )
