"""Projectors: from an encoder's rows to rows of the language model's width.

Shape legend: N rows, I input width, H output width, G = s * s rows of a square of s x s.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.encoders.plain import activation_function

__all__ = ["Projector"]


class Projector(MegatronModule):
    """One linear layer, or several with an activation between them, tensor-parallel.

    Layers are ``linear_fc1``, ``linear_fc2`` ...: the odd ones are split over their outputs, the
    even ones over their inputs; the last of an odd number gathers its outputs.

    Args:
        config: of the language model: precision, initialisation, tensor parallelism.
        input_size: I.
        output_size: H; also the width between layers, unless ``hidden_size`` says otherwise.
        num_layers: linear layers.
        activation: between layers, by its name in Hugging Face's configurations.
        bias: whether layers have one.
        hidden_size: width between layers.
        pg_collection: Megatron's process groups; the global ones by default.

    Raises:
        ConfigError: sizes that are not positive, or that tensor parallelism does not divide.
        UnsupportedError: unknown activation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        input_size: int,
        output_size: int,
        num_layers: int = 2,
        activation: str = "gelu",
        bias: bool = True,
        hidden_size: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        # Rows of media are not spread over the tensor-parallel group, as a sequence is.
        super().__init__(replace(config, sequence_parallel=False, tp_comm_overlap=False))
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = pg_collection.tp
        self.activation = activation_function(activation)
        self.num_layers = num_layers
        hidden_size = output_size if hidden_size is None else hidden_size
        widths = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        if num_layers < 1 or min(widths) < 1:
            raise ConfigError(
                f"a projector of {num_layers} layers with widths {widths}; expected positive "
                "numbers"
            )
        # What is split: the output of every odd layer.
        if any(width % self.tp_group.size() for width in widths[1::2]):
            raise ConfigError(
                f"a projector with widths {widths} is split over {self.tp_group.size()} "
                f"tensor-parallel ranks at {widths[1::2]}; expected multiples"
            )
        for number in range(1, num_layers + 1):
            layer = self._layer(number, widths[number - 1], widths[number], bias=bias)
            self.add_module(f"linear_fc{number}", layer)

    def _layer(
        self, number: int, inputs: int, outputs: int, *, bias: bool
    ) -> ColumnParallelLinear | RowParallelLinear:
        given = {
            "config": self.config,
            "init_method": self.config.init_method,
            "bias": bias,
            "skip_bias_add": False,
            "tp_group": self.tp_group,
        }
        if number % 2:
            is_last = number == self.num_layers
            return ColumnParallelLinear(inputs, outputs, gather_output=is_last, **given)
        return RowParallelLinear(inputs, outputs, input_is_parallel=True, **given)

    def forward(self, rows_NI: Tensor) -> Tensor:
        """[N, I] -> [N, H]; N may be 0."""
        rows = rows_NI
        for number in range(1, self.num_layers + 1):
            rows, _ = self.get_submodule(f"linear_fc{number}")(rows)
            if number < self.num_layers:
                rows = self.activation(rows)
        return rows
