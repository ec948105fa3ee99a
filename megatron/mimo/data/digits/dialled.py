"""Digits to be read, heard or both: the data of the recipe ``digits_dialled``.

The images are those of ``digits``. A digit is heard as a telephone dials it: two tones at once
(DTMF), of random loudness, pitch and beginning, in noise; what the encoder gets is the magnitude of
their spectrogram. Each digit of a number is seen, heard, or both:

    #1 <image> x4 <sound> x4 #2 <sound> x4 what number is this ? ->  4 0 <end>
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.mimo.data.digits import scanned
from megatron.mimo.data.sample import MediaItem, Sample

SOUND = len(scanned.VOCABULARY)
VOCABULARY = (*scanned.VOCABULARY, "<sound>")

RATE = 4000  # samples per second
WINDOW, HOP, FRAMES = 128, 64, 8
LOWEST_BIN, BINS = 20, 32  # 31 Hz each: 625 to 1594 Hz
_LOW, _HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
TONES = {
    0: (_LOW[3], _HIGH[1]),
    **{digit: (_LOW[(digit - 1) // 3], _HIGH[(digit - 1) % 3]) for digit in range(1, 10)},
}


def dial(digit: int, random: np.random.Generator) -> Tensor:
    """A spectrogram float32 [1, BINS, FRAMES] of a digit's two tones."""
    seconds = torch.arange(WINDOW + HOP * (FRAMES - 1)) / RATE
    wave = torch.zeros_like(seconds)
    pitch = 1 + random.uniform(-0.01, 0.01)
    for tone in TONES[digit]:
        loudness, phase = random.uniform(0.5, 1.0), random.uniform(0, 2 * np.pi)
        wave += loudness * torch.sin(2 * np.pi * tone * pitch * seconds + phase)
    wave[: int(random.integers(2 * HOP))] = 0.0
    wave += 0.3 * torch.from_numpy(random.standard_normal(len(wave)).astype(np.float32))
    spectrum = torch.stft(
        wave,
        WINDOW,
        hop_length=HOP,
        window=torch.hann_window(WINDOW),
        center=False,
        return_complex=True,
    )
    return spectrum[None, LOWEST_BIN : LOWEST_BIN + BINS].abs() / (WINDOW / 4)


class DialledDigits(Dataset[Sample]):
    """Questions about digits; sample i is a function of (seed, split, i) alone.

    Args:
        split, samples, seed: as of ``DigitsDataset``.
        rows_per_image, rows_per_sound: embedding rows, and so placeholder tokens, of each.
    """

    def __init__(
        self,
        *,
        split: scanned.Split,
        samples: int,
        seed: int,
        rows_per_image: int,
        rows_per_sound: int,
    ) -> None:
        self._read = scanned.DigitsDataset(
            split=split, samples=samples, seed=seed, rows_per_image=rows_per_image
        )
        self._split, self._seed = split, seed
        self._rows_per_sound = rows_per_sound

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: int) -> Sample:
        seen = self._read[index]
        random = np.random.default_rng((self._seed, 3 + scanned.SPLITS.index(self._split), index))
        answer = seen.token_ids[seen.is_label].tolist()
        prompt: list[int] = []
        media: list[MediaItem] = []
        for place, token in enumerate(answer[:-1]):
            digit = int(scanned.VOCABULARY[token])
            way = random.random()  # one of three: seen, heard, both
            prompt.append(scanned.TOKEN_ID[scanned.MARKERS[place]])
            if way < 2 / 3:
                prompt += self._shown(seen, place, digit)
                media += seen.media[place : place + 1]
            if way > 1 / 3:
                prompt += [SOUND] * self._rows_per_sound
                media.append(
                    MediaItem(
                        modality="sounds",
                        encoder="spectrogram",
                        inputs={"pixel_values": dial(digit, random)},
                        rows=self._rows_per_sound,
                    )
                )
        prompt += scanned.encode(*scanned.QUESTION)
        return Sample(
            name=seen.name.replace("digits/", "digits_dialled/"),
            token_ids=torch.tensor(prompt + answer),
            is_label=torch.arange(len(prompt + answer)) >= len(prompt),
            media=tuple(media),
        )

    @staticmethod
    def _shown(seen: Sample, place: int, digit: int) -> list[int]:
        """A digit in pixels or, in a sample without images, in words."""
        if not seen.media:
            return scanned.encode(scanned.WORDS[digit])
        return [scanned.IMAGE] * seen.media[place].rows
