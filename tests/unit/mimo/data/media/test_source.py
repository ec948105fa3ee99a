"""What is no file, or lies elsewhere, is refused without being opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import MediaLimits, load_audio, load_image, load_video

READERS: dict[str, Callable[..., Any]] = {
    "image": load_image,
    "audio": lambda path, **more: load_audio(path, sampling_rate=8000, **more),
    "video": load_video,
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, kind: str) -> None:
    pipe, loop, folder = tmp_path / "pipe", tmp_path / "loop", tmp_path / "folder"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    cases = [
        (pipe, "pipe is a pipe; expected a regular file"),
        (tmp_path / "socket", "socket is a socket; expected"),
        (Path("/dev/zero"), "/dev/zero is a device; expected"),
        (loop, "loop cannot be read: .*; correct the path"),
        (tmp_path / ("a" * 300), r"a\.\.\.a.* cannot be read: File name too long"),
        (tmp_path / "a\0b", "cannot be read: embedded null"),
        (tmp_path / "none", "none does not exist; correct the path"),
    ]
    if kind != "video":
        cases.append((folder, "folder is a folder; expected a regular file"))
    for path, message in cases:
        with pytest.raises(InputError, match=message):
            READERS[kind](path)
    listener.close()
    os.mkfifo(folder / "1.png")
    with pytest.raises(InputError, match=r"1.png is a pipe"):
        load_video(folder)


def test_media_stay_in_their_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "frames").mkdir()
    (inside / "frames" / "1.png").symlink_to(outside / "a.png")
    limits = MediaLimits(root=inside)
    assert load_image(inside / "a.png", limits=limits).size == (8, 8)
    assert load_image(outside / ".." / "in" / "a.png", limits=limits).size == (8, 8)
    for path in (outside / "a.png", inside / ".." / "out" / "a.png", inside / "link.png"):
        with pytest.raises(InputError, match="lies outside of --media-root"):
            load_image(path, limits=limits)
        assert load_image(path).size == (8, 8)
    with pytest.raises(InputError, match="lies outside of --media-root"):
        load_video(inside / "frames", limits=limits)
    with pytest.raises(InputError, match="lies outside of --media-root"):
        load_video((outside / "a.png",), limits=limits)
