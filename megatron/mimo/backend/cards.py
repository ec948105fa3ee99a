"""GPUs by name, with their peak performance and memory by data sheet: MFU is measured by these."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Card", "dense_bf16_tflops", "find_card", "known_cards"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card by its data sheet.

    Attributes:
        name: what torch's name of the device begins with after "NVIDIA ".
        tflops: of dense bf16 products that are summed in fp32, 10^12 a second.
        memory: bytes; of a card that comes with several sizes, the largest.
    """

    name: str
    tflops: float
    memory: float


# The first that fits counts: the longer names of a kind come first. Memory is in 10^9 bytes.
_CARDS = tuple(
    Card(name=name, tflops=tflops, memory=memory * 1e9)
    for name, tflops, memory in (
        ("A100", 312.0, 80),
        ("A800", 312.0, 80),
        ("A30", 165.0, 24),
        ("A40", 149.7, 48),
        ("A10", 125.0, 24),
        ("H100 PCIe", 756.0, 80),
        ("H100 NVL", 835.0, 94),
        ("H100", 989.4, 80),
        ("H200", 989.4, 141),
        ("H800", 989.4, 80),
        ("GH200", 989.4, 96),
        ("B200", 2250.0, 180),
        ("L40S", 362.0, 48),
        ("L4", 121.0, 24),
        ("RTX A6000", 154.8, 48),
        ("GeForce RTX 3090", 71.0, 24),
        ("GeForce RTX 4090", 165.2, 24),
        ("GeForce RTX 5090", 209.5, 32),
    )
)


def known_cards() -> tuple[str, ...]:
    """The names of all."""
    return tuple(card.name for card in _CARDS)


def find_card(name: str) -> Card | None:
    """The card that the name of a device, or a person ("h100"), means; None if it is not known."""
    words = f"{name.lower().removeprefix('nvidia ').replace('-', ' ')} "
    return next((card for card in _CARDS if words.startswith(f"{card.name.lower()} ")), None)


def dense_bf16_tflops(card: str | None) -> float | None:
    """Peak of a card, by its name; None for one that is not known, and without a card."""
    found = None if card is None else find_card(card)
    return None if found is None else found.tflops
