"""The exceptions that a user can meet: one small tree.

``except MimoError`` catches them all; each is also the built-in error that a script written for
megatron-core's MIMO catches.
"""


class MimoError(Exception):
    """Root of every error that this project raises on purpose."""


class ConfigError(MimoError, ValueError):
    """A model or run was described wrongly; raised at construction, on every rank."""


class InputError(MimoError, ValueError):
    """A batch does not fit the model; the message names subject, got, expected and remedy."""


class PlaceholderMismatchError(InputError):
    """The placeholders of one modality and the rows its encoders gave differ in number.

    Attributes:
        modality: name of the modality ("text" for the text rows).
        placeholders: placeholder tokens found in ``input_ids``.
        rows: embedding rows at hand.
    """

    def __init__(self, message: str, *, modality: str, placeholders: int, rows: int) -> None:
        super().__init__(message)
        self.modality = modality
        self.placeholders = placeholders
        self.rows = rows

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_mismatch, (str(self), self.modality, self.placeholders, self.rows)


def _rebuild_mismatch(
    message: str, modality: str, placeholders: int, rows: int
) -> PlaceholderMismatchError:
    return PlaceholderMismatchError(
        message, modality=modality, placeholders=placeholders, rows=rows
    )


class UnsupportedError(MimoError, RuntimeError):
    """A combination that cannot work; refused by name, with the remedy."""
