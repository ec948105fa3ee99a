"""Files of records, and the order in which a run draws from them.

    files -> records by number (``opening``) -> an order of each source (``orders``)
          -> draws by weight (``mixture``)

``data/global_batches`` goes on from there. Everything that has a position has ``state_dict`` and
``load_state_dict``; nothing of it depends on ranks, workers or micro-batches.
"""

from megatron.mimo.data.sources.index import default_index_folder
from megatron.mimo.data.sources.mixture import Draw, Mixture
from megatron.mimo.data.sources.opening import files_of, open_file
from megatron.mimo.data.sources.specification import MixtureSpec, SourceSpec, read_mixture

__all__ = [
    "Draw",
    "Mixture",
    "MixtureSpec",
    "SourceSpec",
    "default_index_folder",
    "files_of",
    "open_file",
    "read_mixture",
]
