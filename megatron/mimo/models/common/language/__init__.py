"""Language models of transformers as Megatron's GPTModel.

Their kinds (LLaMA, Mistral, Qwen2, Qwen3) differ in biases, norms of queries and keys, grouped
queries, windows, the kind of rotary embedding and whether the output layer is the embedding: what
``kinds`` says of each, and what stands in its Hugging Face configuration.
"""

from megatron.mimo.models.common.language.arguments import language_arguments, text_config
from megatron.mimo.models.common.language.entries import ROTARY_BUFFERS, language_entries
from megatron.mimo.models.common.language.kinds import KINDS, LanguageKind
from megatron.mimo.models.common.language.model import language_spec

__all__ = [
    "KINDS",
    "ROTARY_BUFFERS",
    "LanguageKind",
    "language_arguments",
    "language_entries",
    "language_spec",
    "text_config",
]
