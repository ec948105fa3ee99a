"""How a run leaves: whatever its end, without process groups."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.mimo.training import run


@pytest.mark.parametrize("code", [0, 3], ids=["finished or stopped", "a check failed"])
def test_every_orderly_end_ends_the_process_groups(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> int:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return code

    monkeypatch.setattr(run.presence, "join", lambda **_: None)  # of this process, for good
    monkeypatch.setattr(run, "claim_folders", lambda *_, **__: [])
    monkeypatch.setattr(
        run, "_arguments", lambda *_: (None, Namespace(read_over=[], show_layout=False))
    )
    monkeypatch.setattr(run, "choose_start", lambda *_, **__: (None, None))
    monkeypatch.setattr(run, "_already_finished", lambda *_: False)
    monkeypatch.setattr(run, "_train", train)
    try:
        assert run.main(["--recipe", "digits"]) == code
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
