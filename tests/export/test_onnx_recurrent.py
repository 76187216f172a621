"""Recurrent layers of long sequences: traced whole, not cell by cell, and torch is left as it was."""

import onnx
import pytest
import torch
from stored_models import Linear, assert_same, run_exact
from torch import nn
from torch._decomp import decomposition_table, decompositions

from diffq_fx import DiffQConfig, ExportError, convert_diffq, prepare_diffq
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.while_traced import recurrent_layers_whole


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.out = nn.LazyLinear(5)

    def forward(self, x):
        y, state = self.layer(x)
        return self.out(y), state[0] if isinstance(state, tuple) else state


def converted(layer, x):
    torch.manual_seed(0)
    model = Recurrent(layer)
    model(x)
    model = prepare_diffq(model, x, DiffQConfig(target_bits=6, training_steps=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(x)[0].sum().backward()
    optimizer.step()
    return convert_diffq(model)


@pytest.mark.parametrize("layer", [nn.LSTM(12, 8, 2, bidirectional=True, batch_first=True), nn.GRU(12, 8, 2, bidirectional=True)])
def test_a_long_sequence_is_never_worked_out_cell_by_cell(layer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("worked out cell by cell")

    x = torch.randn(3, 400, 12)
    model = converted(layer, x)
    for name in ("one_layer_lstm", "gru_cell"):
        monkeypatch.setattr(decompositions, name, refuse)
    export_onnx(model, x, tmp_path / "model.onnx")
    assert type(layer).__name__ in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    other = torch.randn(5, 400, 12) if layer.batch_first else torch.randn(3, 400, 12)
    assert_same(run_exact(tmp_path / "model.onnx", other)[0], model(other)[0])


def test_torch_is_as_before_afterwards():
    operators = [torch.ops.aten.lstm.input, torch.ops.aten.gru.input]
    before = [(dict(operator.py_kernels), decomposition_table[operator]) for operator in operators]

    def fail_inside():
        with recurrent_layers_whole():
            assert decomposition_table[operators[0]] is not before[0][1]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [(dict(operator.py_kernels), decomposition_table[operator]) for operator in operators] == before


def test_an_lstm_with_projections_is_refused_by_name(tmp_path):
    x = torch.randn(3, 4, 12)
    model = converted(nn.LSTM(12, 8, proj_size=4), x)
    with pytest.raises(ExportError, match=r"lstm: an LSTM with projections \(proj_size=4, hidden_size=8\)"):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_named_and_what_to_do(enforce_sorted, path):
    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = Linear(16, 16, 4), nn.LSTM(16, 16, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.first(x), lengths.cpu(), batch_first=True, enforce_sorted=enforce_sorted)
            return self.layer(packed)[1][0]

    with pytest.raises(
        ExportError, match=r"it packs sequences .*Export a forward that gives .* padded batch(.|\n)*at .*test_onnx_recurrent"
    ):
        export_onnx(Packing().eval(), (torch.randn(2, 7, 16), torch.tensor([7, 4])), path)
