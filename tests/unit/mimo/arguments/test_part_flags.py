"""Flags that name parts of the model: what is refused."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.part_flags import add_part_arguments, check_parts


def parse(*argv: str) -> Namespace:
    parser = ArgumentParser()
    add_part_arguments(parser.add_argument_group())
    args = parser.parse_args(argv)
    args.lr, args.min_lr, args.decoupled_lr = 1e-2, 1e-3, None
    check_parts(args)
    return args


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--module-lr", "images=0"), "--module-lr images=0.0: must be larger than 0; --freeze"),
        (("--module-lr", "images=nan"), "must be larger than 0"),
        (("--module-wd", "images=-1"), "--module-wd images=-1.0: must be 0 or larger"),
        (("--module-lr", "images=1", "images=2"), "--module-lr: 'images' is given twice"),
        (("--lora", "language", "--lora-rank", "0"), "--lora-rank 0: must be at least 1"),
    ],
)
def test_values_out_of_range(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


@pytest.mark.parametrize("word", ["images", "images=", "=1e-3", "images=fast"])
def test_a_rate_without_name_or_number(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--module-lr", word)
    assert f"'{word}' is no NAME=VALUE" in capsys.readouterr().err
