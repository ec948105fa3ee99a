from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.convert.staging import check_target, whole_directory


def test_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_directory(target, size=10) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


def write_and_raise(target: Path, error: Exception, size: int = 1) -> None:
    with whole_directory(target, size=size) as folder:
        (folder / "a").write_text("x")
        raise error


def test_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_and_raise(tmp_path / "out", RuntimeError())
    assert not list(tmp_path.iterdir())


def test_says_that_the_disk_is_full(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match=r"GB free, 1000000000\.00 GB are needed"):
        write_and_raise(tmp_path / "out", full, size=10**18)
    with pytest.raises(ConfigError, match="the disk is full"):
        write_and_raise(tmp_path / "out", full)
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_target(tmp_path / "file")
    with pytest.raises(ConfigError, match="is not empty"):
        check_target(tmp_path)
    with pytest.raises(ConfigError, match="whose files are copied"):
        check_target(tmp_path / "deep" / "out", source=tmp_path)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
