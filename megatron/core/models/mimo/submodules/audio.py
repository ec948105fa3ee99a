"""The public name for audio; all behaviour is in the base class."""

from megatron.core.models.mimo.submodules.base import ModalitySubmodules


class AudioModalitySubmodules(ModalitySubmodules):
    """Encoders and projection for audio."""
