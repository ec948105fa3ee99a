"""A family for configurations that no family has rules for: a text model's, or a test's own."""

from __future__ import annotations

from typing import Any


def unchecked_family(**contents: Any) -> Any:
    """A ``Family`` of these contents that takes every field of a configuration."""
    from megatron.mimo.models.common.config_fields import ModelFields
    from megatron.mimo.models.common.family import Family

    class Unchecked(Family):
        def arguments(self, config: Any) -> dict[str, object]:
            return self.language(config)

    return Unchecked(fields=ModelFields(rules={}, parts={}), **contents)
