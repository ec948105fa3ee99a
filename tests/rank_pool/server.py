"""The fork server: imports everything once, then forks one supervisor per request."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection

PRELOAD = (
    "numpy",
    "pytest",
    "torch.distributed",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.mimo",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.training.training",
    "megatron.training.checkpointing",
    "sklearn.datasets",  # 2 s
    "peft",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in (
            *("clip", "llama", "llava", "llava_next", "mistral", "qwen2"),
            *("qwen2_5_vl", "qwen2_audio", "siglip", "whisper"),
        )
    ),
    # Half a second in every rank. llava_avlm is left out: it makes itself known to transformers as
    # it is imported, and tests have to see where that is forgotten.
    *(
        f"megatron.mimo.{name}"
        for name in (
            *("convert.verify", "inference", "lora", "training.run", "training.step"),
            *("models.llava", "models.llava_next", "models.qwen2_5_vl", "models.qwen2_audio"),
        )
    ),
)
_MAX_DESCRIPTORS = 250  # of one message on a Unix socket


def main(control_fd: int) -> None:
    """Serves and leaves without the interpreter's slow and chatty unloading of modules."""
    try:
        _serve(socket.socket(fileno=control_fd))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _serve(control: socket.socket) -> None:
    """Preloads, says so on the control socket, and serves until the test process goes.

    The first message is b"ready", or the traceback of the import that failed. Each request is one
    message from the test process that carries descriptors: the run's own socket, then
    the files of its ranks.
    """
    try:
        _preload()
    except BaseException:
        control.sendall(traceback.format_exc().encode())
        return
    control.sendall(b"ready")
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, _MAX_DESCRIPTORS)
        if not data:
            return
        _reap_supervisors()
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() == 0:
            control.close()
            from tests.rank_pool.supervisor import supervise

            supervise(Connection(descriptors[0]), descriptors[1:])
        for fd in descriptors:
            os.close(fd)


def _preload() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    from megatron.mimo.backend import select_backend

    select_backend("cpu")
    for name in PRELOAD:
        importlib.import_module(name)
    from tests.rank_pool.supervisor import count_threads

    if count_threads() != 1:
        raise RuntimeError(
            f"the rank pool's imports left {count_threads()} threads, expected 1: forking such a "
            "process is unsafe; find the import that starts a thread"
        )
    gc.collect()
    gc.freeze()  # the collector of a rank never touches, and so never copies, these pages


def _reap_supervisors() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
