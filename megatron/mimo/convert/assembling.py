"""Makes one checkpoint of a language model and encoders from separate Hugging Face directories.

The projections that join them get new random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.mimo.checkpoints.assets import write_assets
from megatron.mimo.checkpoints.slots import match_slots, model_slots
from megatron.mimo.convert.importing import Imported, import_weights, meta_model
from megatron.mimo.convert.part_tokens import add_tokens, chat_template
from megatron.mimo.convert.part_weights import Growth, PartWeights
from megatron.mimo.convert.staging import check_target
from megatron.mimo.convert.weights import Weights
from megatron.mimo.models import family_names, load_family, read_hf_config
from megatron.mimo.models.common.assembly import LANGUAGE, Assembly
from megatron.mimo.models.common.family import Family

__all__ = ["import_parts"]


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """A model that was put together, weights aside.

    Attributes:
        config: its Hugging Face configuration.
        processor: its Hugging Face processor.
        growth: of the language model's vocabulary.
        notes: what was done, for a human.
    """

    config: Any
    processor: Any
    growth: Growth
    notes: list[str]


def import_parts(
    name: str,
    folders: Mapping[str, Path],
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    shown: bool = True,
) -> str:
    """Write a checkpoint that a run of any layout can start from, of separately published parts.

    Weights that no part has are made fresh, the same ones at every call. The vocabulary gets
    placeholder tokens and a padding token where it has none.

    Args:
        name: of a model family.
        folders: Hugging Face directory of each of the family's parts.
        target: a new directory.
        dtype: of floating-point weights in the checkpoint; those of the files by default.
        threads: that read and write; as many as there are processors, at most 4, by default.
        shown: draw a progress bar on a terminal.

    Returns:
        What was done, for a human.

    Raises:
        ConfigError, UnsupportedError, InputError: see docs/conversion.md; nothing is left behind.
    """
    check_target(target)
    family = load_family(name)
    assembly = _assembly(family)
    _check_parts(family.name, assembly, folders)
    configs = _read_configs(assembly, folders)
    weights = {part: Weights(folder) for part, folder in folders.items()}
    whole = _compose(assembly, folders, configs)
    if dtype is not None:
        whole.config.dtype = dtype
    joined = PartWeights(assembly.parts, weights, whole.growth)
    source = ", ".join(f"{part} ({folder})" for part, folder in folders.items())
    with meta_model(family, whole.config) as model:
        fresh = _make_fresh(family, whole.config, model, joined)
        imported = Imported(
            family=family,
            config=whole.config,
            model=model,
            weights=joined,
            source=source,
            write_assets=lambda folder: write_assets(
                folder, whole.config, whole.processor, str(folders[LANGUAGE])
            ),
        )
        done = import_weights(imported, target, dtype=dtype, threads=threads, shown=shown)
    return "\n".join([done, *fresh, *whole.notes])


def _assembly(family: Family) -> Assembly:
    if family.assembly is None:
        able = [name for name in family_names() if load_family(name).assembly is not None]
        raise ConfigError(
            f"model family '{family.name}' cannot be put together from parts; expected one of "
            f"{', '.join(able)}, or import a whole model: import HF_DIR CHECKPOINT"
        )
    return family.assembly


def _check_parts(name: str, assembly: Assembly, folders: Mapping[str, Path]) -> None:
    unknown = [part for part in folders if part not in assembly.parts]
    missing = [part for part in assembly.parts if part not in folders]
    if not unknown and not missing:
        return
    said = [
        f"{title} {', '.join(several)}"
        for title, several in (("unknown", unknown), ("missing", missing))
        if several
    ]
    wanted = " ".join(f"--part {part}=DIR" for part in assembly.parts)
    raise ConfigError(f"parts of model family '{name}': {'; '.join(said)}; give {wanted}")


def _read_configs(assembly: Assembly, folders: Mapping[str, Path]) -> dict[str, Any]:
    configs = {}
    for part, folder in folders.items():
        config, kinds = read_hf_config(folder), assembly.parts[part].kinds
        if config.model_type not in kinds:
            raise UnsupportedError(
                f"part {part}: {folder} holds a model of type {config.model_type!r}; expected one "
                f"of {', '.join(kinds)}"
            )
        configs[part] = config
    return configs


def _compose(assembly: Assembly, folders: Mapping[str, Path], configs: Mapping[str, Any]) -> _Whole:
    read = {part: _read_part(part, assembly, folder) for part, folder in folders.items()}
    tokenizer, text = read[LANGUAGE], copy.deepcopy(configs[LANGUAGE])
    tokens = {part: one.token for part, one in assembly.parts.items() if one.token is not None}
    growth, notes = add_tokens(tokenizer, tokens, text.vocab_size)
    text.vocab_size, text.pad_token_id = growth.rows, tokenizer.pad_token_id
    template, said = chat_template(tokenizer, tokens)
    config = assembly.compose(
        {**configs, LANGUAGE: text},
        {part: tokenizer.convert_tokens_to_ids(token) for part, token in tokens.items()},
    )
    return _Whole(
        config=config,
        processor=assembly.processor(config, read, template),
        growth=growth,
        notes=[*notes, *said],
    )


def _read_part(part: str, assembly: Assembly, folder: Path) -> Any:
    """The tokenizer, image processor or feature extractor of a part."""
    import transformers

    kind = assembly.parts[part].reader
    try:
        return getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever is missing or damaged in it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "tokenizer" if part == LANGUAGE else "processor"
        files = "tokenizer.json" if part == LANGUAGE else "preprocessor_config.json"
        remedy = f"copy the model's {files} there"
        if part == LANGUAGE and (folder / "tokenizer.model").is_file():
            reason = "its tokenizer.model"  # transformers speaks of what it tried last
            remedy = f"pip install 'megatron-mimo[hf]', where sentencepiece reads it, or {remedy}"
        raise ConfigError(
            f"part {part}: {folder} has no {what} that can be read: {reason}; {remedy}"
        ) from error


def _make_fresh(family: Family, config: Any, model: Any, weights: PartWeights) -> list[str]:
    """Add what belongs to no part to the weights; returns what there is to say of it."""
    assembly, table = _assembly(family), family.keys(config)
    owned = tuple(whole for part in assembly.parts.values() for _, whole in part.prefixes)
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, row in match_slots(model_slots(model), table):
        if not row.hf[0].startswith(owned):
            shapes |= table.hf_shapes(row, slot.shape)
    text = config.get_text_config()
    embedding = weights.by_name.get("language_model.model.embed_tokens.weight")
    dtype = torch.float32 if embedding is None else embedding.dtype
    weights.make(shapes, dtype=dtype, std=text.initializer_range)
    return [
        f"made fresh (biases zero, else normal with standard deviation {text.initializer_range:g}):"
        f" {', '.join(shapes)}"
    ]
