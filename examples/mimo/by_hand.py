"""A MimoModel put together by hand, as for megatron-core's own: python examples/mimo/by_hand.py."""

import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.backend import select_backend

# "cuda", or "cpu" made ready for Megatron: the one line that stock MIMO does not know.
device = select_backend()
backend = {"cuda": "nccl", "cpu": "gloo"}[device]
torch.distributed.init_process_group(
    backend,
    store=torch.distributed.HashStore(),
    rank=0,
    world_size=1,
    device_id=torch.device("cuda", 0) if device == "cuda" else None,
)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)

# An encoder turns inputs into rows, a projection gives them the language model's width.
encoder = ModuleSpec(torch.nn.Linear, params={"in_features": 3 * 16 * 16, "out_features": 64})
projection = ModuleSpec(torch.nn.Linear, params={"in_features": 64, "out_features": 128})
parts = {"encoders": {"patches": encoder}, "input_projections": [projection]}
language = {
    "config": TransformerConfig(num_layers=2, hidden_size=128, num_attention_heads=4),
    "transformer_layer_spec": get_gpt_layer_local_spec(),
    "vocab_size": 1000,
    "max_sequence_length": 64,
    "position_embedding_type": "rope",
}
config = MimoModelConfig(
    language_model_spec=ModuleSpec(GPTModel, params=language),
    modality_submodules_spec={"images": ModuleSpec(VisionModalitySubmodules, submodules=parts)},
    special_token_ids={"images": 999},  # each such token takes one row
)
model = MimoModel(config).to(device)

tokens = torch.randint(0, 999, (2, 16), device=device)
tokens[0, 1:9] = 999  # eight patches in the first sample, none in the second
patches = torch.rand(8, 3 * 16 * 16, device=device)
losses, _ = model(
    input_ids=tokens,
    position_ids=torch.arange(16, device=device).expand(2, -1),
    labels=tokens.roll(-1, dims=1).clamp(max=998),
    modality_inputs={"images": {"patches": {"input": patches}}},
)
losses.mean().backward()
print(f"loss {losses.mean().item():.2f} over {losses.numel()} tokens on {device}")
torch.distributed.destroy_process_group()
