"""A Hugging Face folder is data: no link out of it is followed, none of its Python is run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.checkpoints.assets import read_processor
from megatron.mimo.models import family_of, load_family, read_hf_config
from megatron.mimo.models.common.folder import check_links
from megatron.mimo.recipes.tiny.processors import llava_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config: Any = load_family("llava").tiny()
    config.save_pretrained(tmp_path / "hf")
    llava_processor(config).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_links_out_of_a_folder_are_refused(folder: Path) -> None:
    (folder.parent / "secret").write_text("of this machine")
    for target in (folder.parent / "secret", Path("../secret"), Path("/nowhere"), folder.parent):
        link = folder / "notes.txt"
        link.symlink_to(target)
        for read in (check_links, read_hf_config, read_processor):
            with pytest.raises(ConfigError, match=r"notes\.txt is a symbolic link to .* outside"):
                read(folder)
        link.unlink()
    (folder / "more").mkdir()
    (folder / "more" / "deep").symlink_to("../../secret")
    with pytest.raises(ConfigError, match="more/deep is a symbolic link"):
        check_links(folder)


def test_what_is_no_file_is_refused_and_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "notes.txt")
    for read in (check_links, read_hf_config, read_processor):
        with pytest.raises(
            ConfigError, match=r"notes\.txt is a pipe, a device, a socket or a link"
        ):
            read(folder)


@pytest.mark.parametrize("value", [0, -2, 1.5, "8"])
def test_numbers_of_heads_that_divide_nothing_are_refused(folder: Path, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json.*(num_attention|by zero)"):
        read_hf_config(folder)


@pytest.mark.parametrize("value", [["x" * 9000], [[]], [{}], 3, [None]])
def test_architectures_that_are_no_names_are_refused(folder: Path, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": value}))
    with pytest.raises(MimoError) as refused:
        family_of(read_hf_config(folder))
    assert 0 < len(str(refused.value)) < 1500


@pytest.mark.parametrize("value", [[], "x" * 9000, 0])
def test_sizes_of_patches_that_are_no_numbers_are_refused(folder: Path, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refused:
        read_hf_config(folder)
    assert "patch_size" in str(refused.value) or "cannot be read" in str(refused.value)
    assert len(str(refused.value)) < 1500


def test_an_error_of_transformers_does_not_repeat_a_whole_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "x" * 9000}))
    with pytest.raises(ConfigError) as refused:
        read_hf_config(folder)
    assert "x" * 50 in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_links_within_a_folder_and_to_one_pass(folder: Path) -> None:
    (folder / "same.json").symlink_to("config.json")
    (folder.parent / "link").symlink_to(folder)
    check_links(folder.parent / "link")


def test_a_snapshot_of_the_hubs_cache_passes(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.is_file():
            shutil.move(path, blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert read_hf_config(snapshot).model_type == "llava"
    (snapshot / "x").symlink_to("../../../secret")
    with pytest.raises(ConfigError, match="x is a symbolic link"):
        read_hf_config(snapshot)


PYTHON = "from pathlib import Path\nPath({0!r}).touch()\n"


def test_python_of_a_folder_is_never_run_and_nobody_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(PYTHON.format(str(ran)) + "class C: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    content = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.C", "AutoProcessor": "code.C", "AutoTokenizer": ["code.C", None]}
    (folder / "config.json").write_text(
        json.dumps({**content, "model_type": "of_its_own", "auto_map": auto})
    )
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: .*trust_remote_code"):
        read_hf_config(folder)
    (folder / "config.json").write_text(json.dumps({**content, "auto_map": auto}))
    for path in folder.glob("*_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))
    assert read_hf_config(folder).model_type == "llava"
    with contextlib.suppress(ConfigError):  # where only the folder's Python could read it
        read_processor(folder)
    assert not ran.exists()
