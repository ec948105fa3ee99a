"""What a model description may say, and the role that follows from module grids."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.config import ModuleLayout, ModuleStageInfo, RankRole
from megatron.core.models.mimo.errors import (
    ConfigError,
    InputError,
    MimoError,
    PlaceholderMismatchError,
    UnsupportedError,
)
from megatron.core.transformer.spec_utils import ModuleSpec

SPEC = ModuleSpec(module=object)


def test_config_is_positional_and_has_defaults() -> None:
    config = MimoModelConfig(SPEC, {"images": SPEC}, {"images": -200}, None, "thd")
    assert config.kv_format == "thd"
    assert config.special_token_ids == {"images": -200}
    assert MimoModelConfig(SPEC).module_to_grid_map is None
    assert MimoModelConfig(SPEC).kv_format == "sbhd"
    assert MimoModelConfig(SPEC).modality_submodules_spec == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_format": "bshd"}, r"kv_format is 'bshd'; expected one of"),
        ({"modality_submodules_spec": {"text": SPEC}}, "cannot be called 'text'"),
        ({"modality_submodules_spec": {"language": SPEC}}, "cannot be called 'language'"),
        ({"modality_submodules_spec": {"": SPEC}}, "cannot be called ''"),
        ({"modality_submodules_spec": {"a.b": SPEC}}, "has no dot"),
        ({"special_token_ids": {"images": 3, "audio": 3}}, "'images' and 'audio' share .* 3"),
        ({"special_token_ids": {"images": 3.0}}, r"3\.0 \(float\)"),
        ({"special_token_ids": {"images": True}}, r"True \(bool\)"),
    ],
)
def test_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MimoModelConfig(SPEC, **fields)


def test_grid_names_have_to_be_the_modules() -> None:
    with pytest.raises(
        ValueError, match=r"module_to_grid_map keys must match .*Missing: \['language'\]"
    ) as error:
        MimoModelConfig(SPEC, {"images": SPEC}, {}, {"images": None, "audio": None})  # type: ignore[dict-item]
    assert "Extra: ['audio']" in str(error.value)


@dataclass
class Group:
    """What a role asks of a process group."""

    number: int
    members: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.members


@dataclass
class Grid:
    """A grid-like object, as scripts pass them: nothing but what the contract names."""

    rank_offset: int
    size: int
    dim_names: tuple[str, ...] = ("tp", "dp")
    pp: Group | None = None

    def get_pg(self, name: str) -> Any:
        assert name == "pp"
        return self.pp


@pytest.fixture
def rank_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 5)


def test_uniform_role_has_every_module_whole() -> None:
    role = RankRole.build(["images", "audio"])
    assert role.mode is ModuleLayout.COLOCATED
    assert role.modality_module_names == ["images", "audio"]
    assert role.has_language_module
    assert role.has_modality_modules
    assert role.is_first_stage("images")
    assert role.is_last_stage("language")
    assert not role.is_first_stage("video")
    assert not role.is_last_stage("video")


def test_uniform_role_of_a_later_stage_has_no_encoders() -> None:
    role = RankRole.uniform(["images"], pre_process=False, post_process=False)
    assert not role.has_modality_modules
    assert role.modules == {"language": ModuleStageInfo(is_first_stage=False, is_last_stage=False)}


def test_grids_of_one_extent_are_colocated(rank_5: None) -> None:
    role = RankRole.build(["images"], {"images": Grid(0, 8), "language": Grid(0, 8)})  # type: ignore[dict-item]
    assert role.mode is ModuleLayout.COLOCATED
    assert role.modality_module_names == ["images"]


@pytest.mark.parametrize(("stage", "first", "last"), [(0, True, False), (1, False, True)])
def test_disjoint_grids_give_this_ranks_modules(
    rank_5: None, stage: int, first: bool, last: bool
) -> None:
    grids: Any = {
        "images": Grid(0, 4),
        "language": Grid(4, 4, ("tp", "pp"), Group(stage, 2)),
    }
    role = RankRole.build(["images"], grids)
    assert role.mode is ModuleLayout.NON_COLOCATED
    assert not role.has_modality_modules
    assert role.is_first_stage("language") is first
    assert role.is_last_stage("language") is last


def test_grid_without_pipeline_is_one_stage(rank_5: None) -> None:
    grids: Any = {"images": Grid(4, 4), "language": Grid(0, 4)}
    role = RankRole.build(["images"], grids)
    assert role.modules == {"images": ModuleStageInfo(is_first_stage=True, is_last_stage=True)}
    assert not role.has_language_module


def test_rank_outside_every_grid(rank_5: None) -> None:
    grids: Any = {"images": Grid(0, 2), "language": Grid(2, 2)}
    with pytest.raises(RuntimeError, match=r"Rank 5 is not in any module grid .*2\.\.3"):
        RankRole.build(["images"], grids)
    with pytest.raises(ConfigError, match="empty"):
        RankRole.build(["images"], {})


def test_layout_names_are_the_public_ones() -> None:
    assert ModuleLayout("colocated") is ModuleLayout.COLOCATED
    assert ModuleLayout("non_colocated") is ModuleLayout.NON_COLOCATED


def test_errors_are_one_tree_and_travel_between_processes() -> None:
    error = PlaceholderMismatchError("two", modality="images", placeholders=3, rows=2)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.modality, copy.placeholders, copy.rows) == ("two", "images", 3, 2)
    assert issubclass(PlaceholderMismatchError, InputError)
    for kind, builtin in (
        (ConfigError, ValueError),
        (InputError, ValueError),
        (UnsupportedError, RuntimeError),
    ):
        assert issubclass(kind, MimoError)
        assert issubclass(kind, builtin)
