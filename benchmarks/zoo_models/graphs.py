"""Networks on graphs and points of torch_geometric; two graphs or more stand side by side as one with more nodes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models.entry import Architecture, randn

NODES = 8
_SIZES = {"in_channels": 16, "hidden_channels": 32, "out_channels": 8}


def _built(name: str, **settings: Any) -> nn.Module:
    import torch_geometric.nn

    return getattr(torch_geometric.nn, name)(**settings)


def _ring(batch: int) -> Tensor:
    """Every node has an edge to the next of its graph, and one back."""
    start = torch.arange(NODES)
    edges = torch.stack([torch.cat([start, (start + 1) % NODES]), torch.cat([(start + 1) % NODES, start])])
    return torch.cat([edges + NODES * graph for graph in range(batch)], dim=1)


def _nodes(batch: int) -> tuple[Tensor, ...]:
    return randn(batch * NODES, 16), _ring(batch)


def _of_graph(batch: int) -> Tensor:
    return torch.arange(batch).repeat_interleave(NODES)


def _net(name: str, inputs: Callable[[int], Any] = _nodes, **settings: Any) -> Architecture:
    return Architecture(name, "torch_geometric", "graph", functools.partial(_built, name, **settings), inputs)


def _with_edges(width: int) -> Callable[[int], Any]:
    return lambda batch: {"x": randn(batch * NODES, 16), "edge_index": _ring(batch), "edge_attr": randn(batch * 2 * NODES, width)}


def _edge_conditioned() -> nn.Module:
    return _built("NNConv", in_channels=16, out_channels=8, nn=nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 128)))


def _points(batch: int) -> Any:
    return {"x": randn(batch * NODES, 16), "pos": randn(batch * NODES, 3), "edge_index": _ring(batch)}


ARCHITECTURES = [
    _net("GCN", num_layers=2, **_SIZES),
    _net("GAT", num_layers=2, **_SIZES, heads=2),
    _net("GraphSAGE", num_layers=2, **_SIZES),
    _net("GIN", num_layers=2, **_SIZES),
    _net("PNA", num_layers=2, **_SIZES, aggregators=["mean", "max"], scalers=["identity"], deg=torch.tensor([0, 0, 8])),
    _net("EdgeCNN", num_layers=2, **_SIZES),
    _net("GraphUNet", **_SIZES, depth=2),
    _net("PMLP", **_SIZES, num_layers=2),
    _net("SGFormer", lambda batch: (*_nodes(batch), _of_graph(batch)), **_SIZES, trans_num_layers=1, gnn_num_layers=2),
    _net("Polynormer", lambda batch: (*_nodes(batch), _of_graph(batch)), **_SIZES, local_layers=2, global_layers=1),
    _net(
        "AttentiveFP",
        lambda batch: (*_nodes(batch), randn(batch * 2 * NODES, 4), _of_graph(batch)),
        **_SIZES,
        edge_dim=4,
        num_layers=2,
        num_timesteps=2,
    ),
    _net("GATv2Conv", _with_edges(4), in_channels=16, out_channels=8, heads=2, edge_dim=4),
    _net("TransformerConv", in_channels=16, out_channels=8, heads=2),
    _net("ChebConv", in_channels=16, out_channels=8, K=3),
    _net("PointTransformerConv", _points, in_channels=16, out_channels=8),
    Architecture("NNConv", "torch_geometric", "graph", _edge_conditioned, _with_edges(4)),
]
