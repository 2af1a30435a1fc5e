"""Models of tables and graphs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]

CATEGORIES = (4, 3, 5)


def _row() -> tuple[Tensor, Tensor]:
    """Return three categories and two numbers a sample."""
    columns = [torch.randint(0, count, (BATCH,)) for count in CATEGORIES]
    return torch.stack(columns, dim=1), torch.rand(BATCH, 2)


def _tab_transformer(kind: str) -> Built:
    import tab_transformer_pytorch

    options = {"mlp_act": nn.ReLU()} if kind == "TabTransformer" else {}
    model: nn.Module = getattr(tab_transformer_pytorch, kind)(
        **options,
        categories=CATEGORIES,
        num_continuous=2,
        dim=16,
        depth=3,
        heads=2,
        dim_head=8,
        num_residual_streams=1,
    )
    return model, _row()


def _rtdl(kind: str) -> Built:
    import rtdl_revisiting_models as rtdl

    if kind == "ResNet":
        model: nn.Module = rtdl.ResNet(
            d_in=6,
            d_out=2,
            n_blocks=4,
            d_block=16,
            d_hidden=None,
            d_hidden_multiplier=2.0,
            dropout1=0.1,
            dropout2=0.1,
        )
        return model, torch.rand(BATCH, 6)
    model = rtdl.FTTransformer(
        n_cont_features=2,
        cat_cardinalities=list(CATEGORIES),
        d_out=2,
        n_blocks=3,
        d_block=16,
        attention_n_heads=2,
        attention_dropout=0.1,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=2.0,
        ffn_dropout=0.1,
        residual_dropout=0.1,
    )
    categories, numbers = _row()
    return model, (numbers, categories)


def _tabnet() -> Built:
    from pytorch_tabnet.tab_network import TabNet

    model = TabNet(
        input_dim=6,
        output_dim=2,
        n_d=8,
        n_a=8,
        n_steps=2,
        n_independent=2,
        n_shared=2,
        group_attention_matrix=torch.eye(6),
    )
    return model, torch.rand(BATCH, 6)


NODES = 6
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2, 0], [1, 2, 3, 4, 5, 0, 0, 1, 3]])


def _deep_gcn(block: str) -> Built:
    from torch_geometric.nn import DeepGCNLayer, GENConv

    class DeeperGCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 16)
            self.layers = nn.ModuleList(
                DeepGCNLayer(
                    GENConv(16, 16, aggr="softmax", learn_t=True, num_layers=2, norm="layer"),
                    nn.LayerNorm(16),
                    nn.ReLU(),
                    block=block,
                    dropout=0.1,
                )
                for _ in range(4)
            )
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = self.encoder(x)
            for layer in self.layers:
                x = layer(x, edge_index)
            logits: Tensor = self.head(x)
            return logits

    return DeeperGCN(), (torch.rand(NODES, 5), EDGES)


def _gps() -> Built:
    from torch_geometric.nn import GINEConv, GPSConv

    class GPS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes = nn.Linear(5, 16)
            self.edges = nn.Linear(2, 16)
            self.convs = nn.ModuleList(
                GPSConv(
                    16,
                    GINEConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))),
                    heads=2,
                )
                for _ in range(2)
            )
            self.head = nn.Linear(16, 3)

        def forward(
            self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor
        ) -> Tensor:
            x, edge_attr = self.nodes(x), self.edges(edge_attr)
            for conv in self.convs:
                x = conv(x, edge_index, batch, edge_attr=edge_attr)
            logits: Tensor = self.head(x)
            return logits

    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    return GPS(), (torch.rand(NODES, 5), EDGES, batch, torch.rand(EDGES.shape[1], 2))


def _schnet() -> Built:
    from torch_geometric.nn import SchNet

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SchNet(
                hidden_channels=16,
                num_filters=16,
                num_interactions=3,
                num_gaussians=8,
                interaction_graph=_all_pairs,
            )

        def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
            energy: Tensor = self.net(z, pos, batch)
            return energy

    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    return Dense(), (torch.tensor([6, 1, 1, 8, 1, 1]), torch.rand(NODES, 3) * 3, batch)


def _all_pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edges within each molecule, and their lengths."""
    same = batch[:, None] == batch[None, :]
    edge_index = (same & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().t()
    return edge_index, (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1)


CONFIGURATIONS = (
    Configuration(
        "tab-transformer-pytorch",
        "TabTransformer",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_tab_transformer, "TabTransformer"),
    ),
    Configuration(
        "tab-transformer-pytorch",
        "FTTransformer",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_tab_transformer, "FTTransformer"),
    ),
    Configuration(
        "rtdl-revisiting-models",
        "ResNet",
        4,
        "4 blocks",
        functools.partial(_rtdl, "ResNet"),
    ),
    Configuration(
        "rtdl-revisiting-models",
        "FTTransformer",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_rtdl, "FTTransformer"),
    ),
    Configuration(
        "pytorch-tabnet",
        "TabNet",
        9,
        "3 feature transformers: 1 with shared and 2 with own layers",
        _tabnet,
    ),
    Configuration(
        "torch-geometric",
        "DeepGCNLayer res+",
        8,
        "4 layers, and in each the softmax aggregation, which learns one number",
        functools.partial(_deep_gcn, "res+"),
    ),
    Configuration(
        "torch-geometric",
        "DeepGCNLayer res",
        8,
        "4 layers, and in each the softmax aggregation, which learns one number",
        functools.partial(_deep_gcn, "res"),
    ),
    Configuration("torch-geometric", "GPSConv", 6, "edges, attention and MLP of 2 layers", _gps),
    Configuration("torch-geometric", "SchNet", 3, "3 interactions", _schnet),
)
