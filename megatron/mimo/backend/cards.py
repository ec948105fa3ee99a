"""Cards by their name, and what their makers say they compute: the measure of MFU."""

from __future__ import annotations

__all__ = ["dense_bf16_tflops"]

# What torch.cuda.get_device_name() begins with after "NVIDIA ", and TFLOP/s of dense bf16 products
# that are summed in fp32, by the data sheets. The first that fits counts.
_TFLOPS = (
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("H800", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("GeForce RTX 3090", 71.0),
    ("GeForce RTX 4090", 165.2),
    ("GeForce RTX 5090", 209.5),
)


def dense_bf16_tflops(card: str | None) -> float | None:
    """Peak of a card, by its name; None for one that is not known, and without a card."""
    if card is None:
        return None
    name = card.removeprefix("NVIDIA ").replace("-", " ")
    words = f"{name} "
    return next((peak for begin, peak in _TFLOPS if words.startswith(f"{begin} ")), None)
