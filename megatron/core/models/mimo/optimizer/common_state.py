"""Optimizer state that belongs to no single parameter, loaded by other optimizers than saved it.

Megatron gives experts that are divided over ranks (expert parallelism) an optimizer of their own, a
second link of a ``ChainedOptimizer``; otherwise they are in the first with all else. Tensors are
named after their parameters either way. Parameter groups, steps and loss scales are saved by each
link, so that a checkpoint has as many of them as its run had links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

__all__ = ["COMMON_KEYS", "GROUPS", "CommonState", "identifier", "inner_state", "into_links"]

GROUPS, _SHARDING = "param_groups", "param_state_sharding_type"
COMMON_KEYS = ("grad_scaler", _SHARDING)
_EXPERTS = param_group_identifier_keys.index("is_expert_parallel")


def inner_state(link: Any, state: Mapping[Any, Any]) -> Any:
    """Where Megatron keeps the parameter groups in the state of one of its optimizers."""
    return state if isinstance(link, FP32Optimizer) else state.get("optimizer", {})


def identifier(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What Megatron tells parameter groups apart by."""
    return tuple(group.get(key) for key in param_group_identifier_keys)


@dataclass(frozen=True, kw_only=True)
class CommonState:
    """What the links that saved a checkpoint say of all parameters together.

    Attributes:
        groups: parameter groups, without parameters.
        step: step of all parameters, where it is no part of the groups.
        others: what the whole optimizer has once (``COMMON_KEYS``).
    """

    groups: tuple[Mapping[str, Any], ...]
    step: Any
    others: Mapping[str, Any]

    @classmethod
    def of(cls, state: Mapping[Any, Any], link: Any) -> CommonState:
        """Read it from the loaded state of one link, or of several by number.

        Args:
            state: as ``dist_checkpointing.load`` gives it.
            link: any of the optimizers that load it; all are of one class.
        """
        found = _links(state)
        inner = [inner_state(link, one) for one in found]
        steps = [one.get("state", {}).get("common_step") for one in inner]
        return cls(
            groups=tuple(group for one in inner for group in one.get(GROUPS, ())),
            step=next((step for step in steps if step is not None), None),
            others={key: one[key] for one in found for key in COMMON_KEYS if key in one},
        )

    def group_like(self, group: Mapping[str, Any], of: str) -> dict[str, Any]:
        """The saved values for a parameter group of an optimizer.

        Raises:
            ConfigError: (a ``ValueError``) no group was saved with its rates.
        """
        wanted = identifier(group)
        # Whether experts are divided changes nothing else of a group.
        alike = [one for one in self.groups if _plain(identifier(one)) == _plain(wanted)]
        if not alike:
            raise ConfigError(
                f"the checkpoint has no parameter group of {of} with "
                f"{dict(zip(param_group_identifier_keys, wanted, strict=True))}; train "
                "with the learning rates and weight decays it was saved with"
            )
        same = [one for one in alike if identifier(one) == wanted]
        found = deepcopy(dict((same or alike)[0]))
        key = param_group_identifier_keys[_EXPERTS]
        return {**found, "params": group["params"], key: group.get(key)}

    def state_for(self, link: Any, tensors: Mapping[Any, Any], of: str) -> dict[str, Any]:
        """The state that one optimizer loads.

        Args:
            link: the optimizer.
            tensors: the tensors of its state, as they were loaded.
            of: name of what it optimizes, for an error.
        """
        state: dict[str, Any] = {**tensors, **self.others}
        if isinstance(link, FP32Optimizer):
            inner = state
        else:
            inner = state["optimizer"] = dict(state.get("optimizer", {}))
        groups = link.optimizer.state_dict()[GROUPS]
        inner[GROUPS] = [self.group_like(group, of) for group in groups]
        if "state" in inner and self.step is not None:
            inner["state"] = {**inner["state"], "common_step": self.step}
        return state


def into_links(state: Mapping[Any, Any], links: Sequence[Any]) -> Mapping[Any, Any]:
    """The loaded state of a whole model's optimizer for a chain of so many links.

    Args:
        state: as ``dist_checkpointing.load`` gives it for the chain's tensors.
        links: Megatron's optimizers in the chain.
    """
    told = [one for one in _links(state) if inner_state(links[0], one).get(GROUPS)]
    if len(told) == len(links):
        return state
    once = CommonState.of(state, links[0])
    if len(links) == 1:
        tensors = {key: value for key, value in state.items() if not isinstance(key, int)}
        return once.state_for(links[0], tensors, "the model")
    return {
        number: once.state_for(link, state.get(number, {}), "the model")
        for number, link in enumerate(links)
    }


def _links(state: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The state itself, and those by number in it."""
    return [state, *(state[number] for number in sorted(k for k in state if isinstance(k, int)))]


def _plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[:_EXPERTS] + values[_EXPERTS + 1 :]
