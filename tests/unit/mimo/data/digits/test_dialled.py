"""Digits that are heard: tones at their place, samples whose placeholders fit their media."""

from __future__ import annotations

import numpy as np
import torch

from megatron.mimo.data.digits import dialled as data
from megatron.mimo.data.digits import scanned

ROWS = {"images": 4, "sounds": 4}


def dataset(split: scanned.Split = "train", seed: int = 3) -> data.DialledDigits:
    return data.DialledDigits(
        split=split, samples=60, seed=seed, rows_per_image=4, rows_per_sound=4
    )


def test_a_digit_is_its_two_tones() -> None:
    width = data.RATE / data.WINDOW
    for digit, tones in data.TONES.items():
        spectrum = data.dial(digit, np.random.default_rng(digit))
        assert spectrum.shape == (1, data.BINS, data.FRAMES)
        power = spectrum[0, :, 3:].mean(dim=1)  # the first frames may be silent
        loudest = [int(power[:12].argmax()), 12 + int(power[12:].argmax())]
        for found, tone in zip(loudest, tones, strict=True):
            assert abs((found + data.LOWEST_BIN) * width - tone) < width


def test_samples_show_what_they_ask() -> None:
    kinds, samples = set(), dataset()
    for index in range(60):
        sample = samples[index]
        for modality, token in (("images", scanned.IMAGE), ("sounds", data.SOUND)):
            media = [item for item in sample.media if item.modality == modality]
            assert int((sample.token_ids == token).sum()) == len(media) * ROWS[modality]
            kinds.add((modality, bool(media)))
        answer = sample.token_ids[sample.is_label].tolist()
        assert answer[-1] == scanned.END
        assert scanned.decode(answer).isdecimal()
        assert len(sample.token_ids) <= 48
    assert len(kinds) == 4
    again, other = dataset()[5], dataset(seed=4)[5]
    assert torch.equal(again.token_ids, samples[5].token_ids)
    assert not torch.equal(again.token_ids, other.token_ids)
