"""The garbage collector pauses while modules are imported, and leaves them alone afterwards."""

from __future__ import annotations

import gc

from megatron.mimo.process.collector import uncollected


def test_it_goes_on_afterwards_without_what_was_made() -> None:
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
