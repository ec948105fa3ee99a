"""A model that was built for training's shapes reads sequences of any length, and is as before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron.mimo.inference.whole_sequences import whole_sequences


class Layer(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.cudagraph_manager = torch.nn.Identity()


def test_low_precision_and_graphs_are_off_inside() -> None:
    config = SimpleNamespace(fp8="hybrid", fp4=None, cuda_graph_impl="local")
    layer = Layer(config)
    graphs = layer.cudagraph_manager
    chunk: Any = SimpleNamespace(
        language_model=torch.nn.Sequential(layer, Layer(config)), partition_adapter=None
    )
    with whole_sequences([chunk]):
        assert (config.fp8, config.cuda_graph_impl) == (None, "none")
        assert not hasattr(layer, "cudagraph_manager")  # what a layer asks before it replays
    assert (config.fp8, config.fp4, config.cuda_graph_impl) == ("hybrid", None, "local")
    assert layer.cudagraph_manager is graphs
