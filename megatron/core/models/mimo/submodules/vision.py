"""The public name for images and video; all behaviour is in the base class."""

from megatron.core.models.mimo.submodules.base import ModalitySubmodules


class VisionModalitySubmodules(ModalitySubmodules):
    """Encoders and projection for images and video."""
