"""The fork server: imports everything once, then forks one supervisor per request."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import select
import socket
import sys
import traceback
import weakref
from multiprocessing.connection import Connection

from tests.rank_pool.gaps import fill_gaps
from tests.rank_pool.immortal import make_immortal
from tests.rank_pool.names import ask_no_name_server
from tests.rank_pool.pages import use_huge_pages
from tests.rank_pool.threads import BusyThreadsError, come_to_rest, describe, other_threads

PRELOAD = (
    "numpy",
    "pytest",
    "torch.distributed",
    "torch._dynamo",
    "torch.nn.attention.varlen",  # a fifth of a second: it registers operators
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "megatron.core.datasets.helpers_cpp",
    "megatron.core.datasets.utils",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.mimo",
    "megatron.core.models.mimo.comm.bridge_grid",
    "megatron.core.models.mimo.model.encode_first",
    "megatron.core.models.mimo.optimizer.whole",
    "megatron.core.models.vision.multimodal_projector",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tokenizers.text.models",
    "megatron.training.training",
    "megatron.training.checkpointing",
    "sklearn.datasets",  # 2 s
    "peft",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in (
            *("clip", "gemma3", "internvl", "llama", "llava", "llava_next", "mistral", "qwen2"),
            *("qwen2_5_vl", "qwen2_audio", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe"),
            *("qwen3_5", "qwen3_5_moe", "siglip", "whisper"),
        )
    ),
    "transformers.models.clip.image_processing_clip",
    "transformers.models.llava.processing_llava",
    # Half a second in every rank. llava_avlm is left out: it makes itself known to transformers as
    # it is imported, and tests have to see where that is forgotten.
    *(
        f"megatron.mimo.{name}"
        for name in (
            *("backend.host_sync", "convert.verify", "layers.deepstack", "lora"),
            *("data.chat.dataset", "data.formats", "data.reading.record_dataset"),
            *("inference", "inference.assistant", "inference.command", "inference.text_stream"),
            *("models.common.flops", "models.common.templates", "process.children"),
            *(
                f"training.{job}"
                for job in (
                    *("curve", "encoder_cache", "forward_step", "generate", "model", "run"),
                    *("data", "module_grids", "nonfinite", "part_optimizer", "planned_data"),
                    *("profile_summary", "profiling", "watch", "workers"),
                )
            ),
            *(
                f"recipes.{name}"
                for name in ("digits", "language", "pretrained", "report", "tiny.twin")
            ),
            *(
                f"models.{name}.model"
                for name in (
                    *("gemma3", "internvl", "llava", "llava_next", "qwen2_5_vl", "qwen2_audio"),
                    *("qwen3_5", "qwen3_vl"),
                )
            ),
            *("models.qwen3_5.moe", "models.qwen3_vl.moe"),
        )
    ),
    # What most tests with ranks import, which each run would import again.
    *(
        f"tests.{name}"
        for name in (
            *("distributed.convert.models", "distributed.inference.prompts"),
            *("distributed.lora.ranks", "distributed.schedule", "matrix.ranks"),
            *(
                f"distributed.core.{name}"
                for name in ("disjoint", "documents", "encoders", "grids", "heads", "split_model")
            ),
            *(f"distributed.models.{name}" for name in ("packed", "ranks", "text_kinds")),
            *("unit.core.mimo.interpreted", "unit.core.mimo.test_stock"),
        )
    ),
)
_MAX_DESCRIPTORS = 250  # of one message on a Unix socket


def main(fd: int, imports: str) -> None:
    """Serves and leaves without the interpreter's slow and chatty unloading of modules.

    Args:
        fd: a socket to a test process, or one at which several connect.
        imports: names of modules, with commas between.
    """
    ask_no_name_server()
    try:
        _serve(socket.socket(fileno=fd), imports.split(","))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _serve(first: socket.socket, imports: list[str]) -> None:
    """Preloads, says so to each test process, and serves until the last one goes.

    The first message is a line of JSON: ``{"threads": [words for each idle thread]}``, or
    ``{"failure": why}``. Each request is one message from a test process that carries
    descriptors: the run's own socket, then the files of its ranks.
    """
    greeting = _greeting(imports)
    door = first if first.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) else None
    clients = [door.accept()[0] if door else first]
    _say(clients[0], greeting)
    while clients:
        for source in select.select([*clients, *filter(None, [door])], [], [])[0]:
            if source is door:
                clients.append(source.accept()[0])
                _say(clients[-1], greeting)
            elif not _answer(source, [*clients, *filter(None, [door])]):
                clients.remove(source)
                source.close()


def _greeting(imports: list[str]) -> dict[str, object]:
    try:
        return {"threads": _preload(imports)}
    except BusyThreadsError as error:
        return {"failure": str(error)}
    except BaseException:
        return {"failure": traceback.format_exc()}


def _answer(client: socket.socket, sockets: list[socket.socket]) -> bool:
    """Forks a supervisor for a request, without the server's own ``sockets``; False at the end."""
    try:
        data, descriptors, _, _ = socket.recv_fds(client, 1, _MAX_DESCRIPTORS)
    except ConnectionResetError:
        return False
    if not data:
        return False
    _reap_supervisors()
    sys.stdout.flush()
    sys.stderr.flush()
    _fork_supervisor(sockets, descriptors)
    for fd in descriptors:
        os.close(fd)
    return True


def _fork_supervisor(sockets: list[socket.socket], descriptors: list[int]) -> None:
    from tests.rank_pool.messages import Refusal, send
    from tests.rank_pool.supervisor import supervise

    try:
        come_to_rest()
    except BusyThreadsError as error:
        with Connection(os.dup(descriptors[0])) as run:
            send(run, Refusal(reason=str(error)))
        return
    if os.fork() == 0:
        for own in sockets:
            own.close()
        supervise(Connection(descriptors[0]), descriptors[1:])


def _say(client: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has gone: seen next
        client.sendall(json.dumps(message).encode() + b"\n")


def _preload(imports: list[str]) -> list[str]:
    """Imports what ranks need; what there is to say about threads that this left, all idle.

    Raises:
        BusyThreadsError: the imports left a thread that keeps running.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    gc.disable()  # it would take a fifth of the time
    from megatron.mimo.backend import select_backend

    started_by: dict[int, str] = {thread.number: "torch" for thread in other_threads()}
    select_backend("cpu")
    for name in imports:
        importlib.import_module(name)
        for thread in other_threads():
            started_by.setdefault(thread.number, name)
    if "megatron.training.arguments" in sys.modules:
        _remember_docstrings()
    if "sklearn.datasets" in sys.modules:
        _remember_digits()
    if "megatron.mimo.convert.verify" in sys.modules:
        _remember_transformers()
    _remember_distributions()
    _end_without_finalizers()
    try:
        left = come_to_rest()
    except BusyThreadsError as error:
        culprits = ", ".join(sorted({started_by.get(t.number, "?") for t in other_threads()}))
        raise BusyThreadsError(
            f"importing {culprits} left threads: {error}. Ranks are forked, which is sound only "
            "beside threads that sleep; find the import that starts them (PRELOAD in "
            "tests/rank_pool/server.py lists all), or run the tests in an environment without it"
        ) from None
    gc.collect()
    make_immortal()
    gc.freeze()  # the collector of a rank never touches, and so never copies, these pages
    gc.enable()
    fill_gaps()
    use_huge_pages()
    return [f"{describe(t)}, started by {started_by.get(t.number, '?')}" for t in left]


def _remember_docstrings() -> None:
    """Lets ranks find what Megatron's parser reads from the source of its classes, every time."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def docstrings(self: ArgumentGroupFactory, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(self, config)
        return dict(known[config])

    ArgumentGroupFactory._get_field_docstrings = docstrings
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _remember_digits() -> None:
    """Lets ranks have the images of most recipes, a tenth of a second each time."""
    from megatron.mimo.data.digits.scanned import load_images

    for held_out in (False, True):
        load_images(held_out=held_out)


def _remember_transformers() -> None:
    """Lets ranks have what is made once a process: old checkpoints' names, configurations."""
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from megatron.mimo.models import family_names, load_family
    from megatron.mimo.models.common.config_fields import defaults_of

    get_checkpoint_conversion_mapping("llava")
    for name in family_names():
        if name == "llava_avlm":  # see above
            continue
        for kind in (name, *itertools.chain(*load_family(name).fields.parts.values())):
            if kind in CONFIG_MAPPING:
                defaults_of(CONFIG_MAPPING[kind])


def _remember_distributions() -> None:
    """Lets ranks know what is installed: torch looks for backends of others in every process."""
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points(group="torch.distributed.backends")


def _end_without_finalizers() -> None:
    """Lets ranks leave alone at their end what they did not make.

    Those of torch's operators write to 30 MB, which each run of a script would copy.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _reap_supervisors() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
