"""Output layers that a configuration ties to the embedding and the files do not.

transformers keeps both where a directory holds both and they differ. Here a model is tied or not
by its configuration, so such a model is imported with one that says that it is not.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from megatron.mimo.checkpoints.match import match_names
from megatron.mimo.convert.stacked import unstacked
from megatron.mimo.convert.weights import WeightSource
from megatron.mimo.models.common.family import Family

__all__ = ["config_of_files", "say_untied"]

_FIELD = "tie_word_embeddings"


def config_of_files(
    family: Family, config: Any, weights: WeightSource, *, source: str
) -> tuple[Any, list[str]]:
    """The configuration that fits the files, and a note where it differs from the given one.

    Args:
        family: the model's.
        config: its Hugging Face configuration.
        weights: of the directory.
        source: the directory, for errors.

    Returns:
        ``config`` itself, or a copy of it without the tie.

    Raises:
        InputError: weights are missing, unexpected or given in two spellings.
    """
    weights, table = unstacked(weights, family.keys(config))
    match = match_names(weights.by_name.keys(), table, source=source)
    differing = [
        f"{name} differs from {match.given[origin]}"
        for name, origin in match.copies.items()
        if not torch.equal(weights.read(name), weights.read(match.given[origin]))
    ]
    if not differing:
        return config, []
    untied = copy.deepcopy(config)
    for part in (untied, untied.get_text_config()):
        part.update({_FIELD: False})
    note = (
        f"warning: {'; '.join(differing)}, though config.json ties them; as in transformers, both "
        f"are kept, and the checkpoint's config.json says {_FIELD}: false"
    )
    return untied, [note]


def say_untied(path: Path) -> None:
    """Write into a config.json that nothing is tied, in all of its parts that say it is."""
    content = json.loads(path.read_text())
    for part in (content, content.get("text_config")):
        if part is content or (isinstance(part, dict) and part.get(_FIELD)):
            part[_FIELD] = False
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
