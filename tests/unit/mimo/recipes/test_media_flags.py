"""How a run reads media is kept with its checkpoint, and flags that make no sense are refused."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.media.files import MediaLimits
from megatron.mimo.recipes.media_flags import (
    add_media_arguments,
    keep_media_settings,
    kept_video_fps,
    media_limits,
)


def parsed(*flags: str) -> Namespace:
    parser = ArgumentParser()
    add_media_arguments(parser, video_fps=2.0)
    return parser.parse_args(flags)


def test_the_rate_of_videos_is_kept(tmp_path: Path) -> None:
    assert kept_video_fps(tmp_path) == 2.0
    for fps in (8.0, 0.5):
        keep_media_settings(tmp_path, video_fps=fps)
        assert kept_video_fps(tmp_path) == fps
    assert [file.name for file in tmp_path.iterdir()] == ["mimo_media.json"]
    for text in ("{", "[1]", '{"video_fps": 0}', '{"video_fps": "a"}', "{}"):
        (tmp_path / "mimo_media.json").write_text(text)
        with pytest.raises(ConfigError, match=r"mimo_media.json is damaged: .*; repair or delete"):
            kept_video_fps(tmp_path)


def test_flags_say_the_limits(tmp_path: Path) -> None:
    assert media_limits(parsed()) == MediaLimits()
    flags = ["--max-image-pixels", "9", "--max-video-pixels", "99", "--media-root", str(tmp_path)]
    assert media_limits(parsed(*flags)) == MediaLimits(
        image_pixels=9, video_pixels=99, root=tmp_path
    )


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--video-fps", "0", "--video-fps is 0.0; expected more than 0"),
        ("--video-fps", "nan", "--video-fps is nan"),
        ("--max-image-pixels", "-1", "--max-image-pixels is -1"),
        ("--max-video-pixels", "0", "--max-video-pixels is 0"),
        ("--media-root", "/none/such", "--media-root /none/such: there is no such folder"),
    ],
)
def test_flags_without_sense_are_refused(flag: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        media_limits(parsed(flag, value))
