"""Damaged media files, and what only looks like one."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from PIL import Image

from tests.chaos.fuzz import Case, scramble

__all__ = ["media"]


def _picture(format_: str, mode: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise((24, 16), 80).convert(mode)
    image.save(file, format_, **settings)
    return file.getvalue()


def _animation(format_: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.effect_noise((16, 16), 60).convert("RGB") for _ in range(4)]
    frames[0].save(file, format_, save_all=True, append_images=frames[1:], duration=40)
    return file.getvalue()


def _recording() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(16000)
        recording.writeframes(bytes(range(256)) * 20)
    return file.getvalue()


def _coded_recording(format_: str) -> bytes:
    import numpy as np
    import soundfile

    file = io.BytesIO()
    samples = np.sin(np.arange(8000) / 9)
    soundfile.write(file, np.stack([samples, samples / 2], axis=1), 44100, format=format_)
    return file.getvalue()


def _clip(format_: str) -> bytes:
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(6):
            pixels = np.full((32, 32, 3), number * 40, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return file.getvalue()


def _impostor(path: Path, random: Random) -> None:
    """What is no file, by the name of one."""
    kind = random.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to("/nowhere")
    elif kind == 5:
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        path.write_bytes(b"")


@contextmanager
def media() -> Iterator[Case]:
    """Cases: a picture, a recording or a clip, damaged or another thing altogether, in a file or in
    memory."""
    from megatron.mimo.data.media import files

    sources = {
        "a.png": _picture("PNG", "RGBA"),
        "b.png": _picture("PNG", "L"),
        "c.jpg": _picture("JPEG", "RGB"),
        "d.webp": _picture("WEBP", "RGB"),
        "e.tiff": _picture("TIFF", "RGB"),
        "f.bmp": _picture("BMP", "P"),
        "g.gif": _animation("GIF"),
        "h.webp": _animation("WEBP"),
        "i.wav": _recording(),
        "k.jpg": _picture("JPEG", "CMYK"),
        "l.png": _picture("PNG", "I;16"),
        "m.png": _picture("PNG", "P"),
    }
    with contextlib.suppress(ImportError):  # without PyAV there are no clips in containers
        sources |= {"j.mp4": _clip("mp4"), "n.mkv": _clip("matroska"), "o.avi": _clip("avi")}
    with contextlib.suppress(ImportError):  # without soundfile there is WAV alone
        sources |= {"p.flac": _coded_recording("FLAC"), "q.ogg": _coded_recording("OGG")}
    readers = {
        "image": lambda path: files.load_image(path),
        "audio": lambda path: files.load_audio(path, sampling_rate=16000),
        "video": lambda path: files.load_video(path, files.FrameSampling(fps=4.0)),
    }
    fitting = {
        **dict.fromkeys((".wav", ".flac", ".ogg"), "audio"),
        **dict.fromkeys((".gif", ".mp4", ".mkv", ".avi"), "video"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def case(random: Random) -> None:
            source = random.choice(list(sources))
            path = folder / source
            reader = fitting.get(path.suffix, "image")
            if random.random() < 0.2:
                reader = random.choice(list(readers))
            try:
                if random.random() < 0.1:
                    _impostor(path, random)
                else:
                    data = scramble(sources[source], random)
                    if random.random() < 0.3:  # as it lies in a table or a tar
                        readers[reader](files.EncodedMedium(data=data, name=source))
                        return
                    path.write_bytes(data)
                readers[reader](path)
            finally:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

        yield case
