"""Conversations about scanned digits and tones, made from their number alone.

Shape legend: T frames, H height, W width, L audio samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.digits.scanned import load_images
from megatron.mimo.data.media.files import Video

__all__ = [
    "QUESTIONS",
    "TONES",
    "TONE_RATE",
    "Made",
    "digit_image",
    "digits_or_clip",
    "say_digits",
    "say_tones",
    "say_tones_and_digits",
]

TONE_RATE = 16000  # Hz; the tiny encoders hear a second
TONES = {"low": 300.0, "middle": 900.0, "high": 2700.0}  # Hz
_DIGITS = "What digits?"
_CLIP = "What digit moves?"
_SOUNDS = "What tones?"
_BOTH = "What digits and tones?"
QUESTIONS = (_DIGITS, _CLIP, _SOUNDS, _BOTH, "user: assistant: USER: ASSISTANT:", *TONES)

Maker = Callable[[str, np.random.Generator, bool], Conversation]


class Made(Sequence[Conversation]):
    """Conversation i is made from i alone; held-out ones show digits that no other one shows."""

    def __init__(self, make: Maker, count: int, *, held_out: bool) -> None:
        self._make = make
        self._count = count
        self._held_out = held_out

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        split = "held out" if self._held_out else "train"
        generator = np.random.default_rng((int(self._held_out), index))
        return self._make(f"{split} {index}", generator, self._held_out)


def say_digits(name: str, random: np.random.Generator, held_out: bool) -> Conversation:
    """One or two images of digits, of different sizes."""
    shown = [_digit(random, held_out) for _ in range(random.integers(1, 3))]
    parts = [ContentPart(kind="image", value=digit_image(grey_HW, random)) for grey_HW, _ in shown]
    return _conversation(name, parts, _DIGITS, "".join(str(digit) for _, digit in shown))


def digits_or_clip(name: str, random: np.random.Generator, held_out: bool) -> Conversation:
    """As :func:`say_digits`, or in one of four conversations a clip in which a digit moves."""
    if random.random() >= 0.25:
        return say_digits(name, random, held_out)
    grey_HW, digit = _digit(random, held_out)
    side = int(random.integers(12, 17))
    frames_THWC = np.zeros((int(random.integers(3, 7)), side, side, 3), dtype=np.uint8)
    for at, frame_HWC in enumerate(frames_THWC):
        left = at % (side - 7)
        frame_HWC[:8, left : left + 8] = grey_HW[..., None]
    video = Video(frames_THWC=frames_THWC, fps=2.0)
    return _conversation(name, [ContentPart(kind="video", value=video)], _CLIP, str(digit))


def say_tones(name: str, random: np.random.Generator, held_out: bool) -> Conversation:
    """One or two tones of different lengths."""
    words = random.choice([*TONES], size=int(random.integers(1, 3))).tolist()
    del held_out  # a tone is made anew each time
    parts = [ContentPart(kind="audio", value=_tone(TONES[word], random)) for word in words]
    return _conversation(name, parts, _SOUNDS, " ".join(words))


def say_tones_and_digits(name: str, random: np.random.Generator, held_out: bool) -> Conversation:
    """A digit and a tone, in either order."""
    grey_HW, digit = _digit(random, held_out)
    word = str(random.choice([*TONES]))
    image = ContentPart(kind="image", value=digit_image(grey_HW, random))
    audio = ContentPart(kind="audio", value=_tone(TONES[word], random))
    parts = [image, audio] if random.random() < 0.5 else [audio, image]
    return _conversation(name, parts, _BOTH, f"{digit} {word}")


def digit_image(grey_HW: np.ndarray, random: np.random.Generator) -> object:
    """An RGB Pillow image of a scanned digit, 16 to 40 pixels high and wide."""
    from PIL import Image

    size = int(random.integers(16, 41)), int(random.integers(16, 41))
    return Image.fromarray(grey_HW).convert("RGB").resize(size)


def _conversation(name: str, media: list[ContentPart], question: str, answer: str) -> Conversation:
    asked = (*media, ContentPart(kind="text", value=question))
    return Conversation(
        name=name,
        turns=(
            Turn(role="user", content=asked),
            Turn(role="assistant", content=(ContentPart(kind="text", value=answer),)),
        ),
    )


def _digit(random: np.random.Generator, held_out: bool) -> tuple[np.ndarray, int]:
    """Grey uint8 [8, 8], and the digit that it shows."""
    images = load_images(held_out=held_out)
    pick = int(random.integers(len(images.values)))
    grey_HW = (images.pixels[pick, 0, 0].numpy() * 255).round().astype(np.uint8)
    return grey_HW, int(images.values[pick])


def _tone(frequency: float, random: np.random.Generator) -> np.ndarray:
    """Float32 [L]: 0.2 to 0.6 seconds of a tone, a little off its pitch, with some noise."""
    time_L = np.arange(int(TONE_RATE * random.uniform(0.2, 0.6))) / TONE_RATE
    pitch = frequency * random.uniform(0.9, 1.1)
    noise_L = random.normal(scale=0.02, size=len(time_L))
    return (0.5 * np.sin(2 * np.pi * pitch * time_L) + noise_L).astype(np.float32)
