"""Scanned digits to be read: the data of the recipe ``digits``.

Source: the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships (UCI "Optical
Recognition of Handwritten Digits"). They are split by image, so that a held-out image was never
seen in training. A sample shows one to four of them and asks for the number; one in ten spells
the number in words instead:

    #1 <image> x4 #2 <image> x4 what number is this ? ->  4 0 <end>
    #1 seven #2 three #3 three  what number is this ? ->  7 3 3 <end>
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.media.image_tensors import decode_image
from megatron.mimo.data.sample import MediaItem, Sample

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

IMAGE_SIZE = 8
MAX_DIGITS = 4
HELD_OUT = 0.2
TEXT_ONLY = 0.1
VARIANTS = 32  # augmented versions of each training image; they take 12 MB and 0.1 s

MARKERS = ("#1", "#2", "#3", "#4")
QUESTION = ("what", "number", "is", "this", "?", "->")
DIGITS = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("<pad>", "<end>", "<image>", *MARKERS, *QUESTION, *DIGITS, *WORDS)
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
PAD, END, IMAGE = TOKEN_ID["<pad>"], TOKEN_ID["<end>"], TOKEN_ID["<image>"]


def encode(*tokens: str) -> list[int]:
    """Token ids of named tokens."""
    return [TOKEN_ID[token] for token in tokens]


def decode(token_ids: list[int]) -> str:
    """What an answer says: its tokens up to ``<end>``, run together ("407").

    Any token but a digit stands in the text by name, ids beyond the vocabulary (which Megatron
    pads) as ``<id>``, so that a wrong answer shows what it is.
    """
    answer = token_ids[: token_ids.index(END)] if END in token_ids else token_ids
    return "".join(VOCABULARY[i] if 0 <= i < len(VOCABULARY) else f"<{i}>" for i in answer)


def question_text(sample: Sample) -> str:
    """What is asked, for people: "what number is this?", with the words in front, if any."""
    words = [VOCABULARY[i] for i in sample.token_ids.tolist() if VOCABULARY[i] in WORDS]
    return f"“{' '.join(words)}” what number is this?" if words else "what number is this?"


def score(samples: Sequence[Sample], answers: Sequence[list[int]]) -> dict[str, float]:
    """Compare generated answers with the true ones.

    Returns:
        ``digit_accuracy``: digits of image samples that stand in the answer at their place; digits
        too many count as wrong. ``exact_match``: image samples answered right as a whole.
        ``text_exact_match``: the same for samples in words. ``test_samples``: all of them. A share
        of nothing is NaN.
    """
    digits = right_digits = 0
    whole: dict[bool, list[bool]] = {True: [], False: []}  # by "has images"
    for sample, answer in zip(samples, answers, strict=True):
        truth = sample.token_ids[sample.is_label].tolist()[:-1]
        said = answer[: answer.index(END)] if END in answer else answer
        whole[bool(sample.media)].append(said == truth)
        if sample.media:
            digits += max(len(truth), len(said))
            right_digits += sum(a == b for a, b in zip(truth, said, strict=False))

    def share(part: int, of: int) -> float:
        return part / of if of else math.nan

    return {
        "digit_accuracy": share(right_digits, digits),
        "exact_match": share(sum(whole[True]), len(whole[True])),
        "text_exact_match": share(sum(whole[False]), len(whole[False])),
        "test_samples": len(samples),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class DigitImages:
    """Images of one side of the split.

    Attributes:
        pixels: float32 [images, variants, 1, 8, 8] in 0..1; one variant where nothing is augmented.
        values: int64 [images]; the digit that each image shows.
        source: int64 [images]; its place among scikit-learn's 1,797.
    """

    pixels: Tensor
    values: Tensor
    source: Tensor


@cache
def load_images(*, held_out: bool) -> DigitImages:
    """The images of one side of the split, which is the same in every process and for every seed.

    Of each digit every fifth image, in a fixed random order, is held out.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    bunch = load_digits()
    shuffled = np.random.default_rng(0).permutation(len(bunch.target))
    source = []
    for digit in range(10):
        of_digit = shuffled[bunch.target[shuffled] == digit]
        border = round(len(of_digit) * HELD_OUT)
        source.extend(of_digit[:border] if held_out else of_digit[border:])
    grey = np.round(bunch.images[source] * (255 / 16)).astype(np.uint8)
    pixels = torch.stack(
        [
            decode_image(image, channels=1, name=f"digit {index}")
            for image, index in zip(grey, source, strict=True)
        ]
    )[:, None]
    return DigitImages(
        pixels=pixels, values=torch.tensor(bunch.target[source]), source=torch.tensor(source)
    )


def augment(pixels_NCHW: Tensor, *, variants: int, seed: int) -> Tensor:
    """Rotate, scale, shear, shift, fade and blemish each image at random.

    Returns:
        float32 [N, variants, C, H, W] in 0..1, a function of the arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    images_MCHW = pixels_NCHW.repeat_interleave(variants, dim=0)
    count = len(images_MCHW)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, zoom, shear = uniform(math.radians(12)), 1 + uniform(0.1), uniform(0.15)
    row_x = torch.stack([zoom * angle.cos(), shear - angle.sin(), uniform(0.175)], dim=1)
    row_y = torch.stack([angle.sin(), zoom * angle.cos(), uniform(0.175)], dim=1)
    grid = F.affine_grid(
        torch.stack([row_x, row_y], dim=1), list(images_MCHW.shape), align_corners=False
    )
    moved_MCHW = F.grid_sample(images_MCHW, grid, align_corners=False)
    noise_MCHW = 0.05 * torch.randn(moved_MCHW.shape, generator=generator)
    faded_MCHW = moved_MCHW * (1 + uniform(0.15))[:, None, None, None] + noise_MCHW
    return faded_MCHW.clamp(0, 1).unflatten(0, (len(pixels_NCHW), variants))


class DigitsDataset(Dataset[Sample]):
    """Questions about digits; sample i is a function of (seed, split, i) alone.

    Args:
        split: "train" shows augmented training images; "valid" and "test" show held-out images
            as they are, and differ in the questions they draw.
        samples: number of samples.
        seed: of the questions and the augmentation.
        rows_per_image: embedding rows, and so placeholder tokens, of one image.
    """

    def __init__(self, *, split: Split, samples: int, seed: int, rows_per_image: int) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split '{split}'; expected one of {SPLITS}")
        if samples < 0 or seed < 0 or rows_per_image < 1:
            raise ConfigError(
                f"samples={samples}, seed={seed}, rows_per_image={rows_per_image}; "
                "expected samples >= 0, seed >= 0 and rows_per_image >= 1"
            )
        self._images = load_images(held_out=split != "train")
        self._pixels = self._images.pixels
        if split == "train":
            self._pixels = augment(self._pixels[:, 0], variants=VARIANTS, seed=seed)
        self._split, self._samples, self._seed = split, samples, seed
        self._rows_per_image = rows_per_image

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._samples:
            raise IndexError(f"sample {index} of {self._samples}")
        random = np.random.default_rng((self._seed, SPLITS.index(self._split), index))
        count = int(random.integers(1, MAX_DIGITS + 1))
        media: tuple[MediaItem, ...] = ()
        if random.random() < TEXT_ONLY:
            digits = random.integers(10, size=count).tolist()
            shown = [encode(WORDS[digit]) for digit in digits]
        else:
            picks = random.integers(len(self._pixels), size=count).tolist()
            variants = random.integers(self._pixels.shape[1], size=count).tolist()
            digits = [int(self._images.values[pick]) for pick in picks]
            shown = [[IMAGE] * self._rows_per_image] * count
            media = tuple(
                MediaItem(
                    modality="images",
                    encoder="vit",
                    inputs={"pixel_values": self._pixels[pick, variant]},
                    rows=self._rows_per_image,
                )
                for pick, variant in zip(picks, variants, strict=True)
            )
        prompt: list[int] = []
        for marker, block in zip(MARKERS, shown, strict=False):
            prompt += [TOKEN_ID[marker], *block]
        prompt += encode(*QUESTION)
        answer = [*encode(*(DIGITS[digit] for digit in digits)), END]
        return Sample(
            name=f"digits/{self._split}/{index}",
            token_ids=torch.tensor(prompt + answer),
            is_label=torch.arange(len(prompt + answer)) >= len(prompt),
            media=media,
        )
