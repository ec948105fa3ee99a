"""What a callable takes, and whether a script has put its own in place of a method."""

from __future__ import annotations

import inspect
from typing import Any


def accepts(function: Any, name: str) -> bool:
    """True where ``function`` takes a keyword argument of that name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def names_argument(function: Any, name: str) -> bool:
    """True where ``function`` has an argument of that name, ``**kwargs`` left aside."""
    return name in inspect.signature(function).parameters


def is_replaced(model: object, owner: type, *names: str) -> bool:
    """True where a subclass, or the instance, has put its own in place of a method of ``owner``."""
    return any(
        name in vars(model) or getattr(type(model), name) is not getattr(owner, name)
        for name in names
    )
