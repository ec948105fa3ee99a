"""Optimizers of modules whose state in a checkpoint is that of one optimizer of the whole model.

Megatron's optimizers name the state of a parameter after the parameter, so what several of them
write for their modules is what one would write for all; only what is not a tensor (parameter
groups, step, loss scale) has to be written once. Such a checkpoint loads in every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.optimizer.combined import MimoOptimizer, links_of
from megatron.core.models.mimo.optimizer.common_state import (
    COMMON_KEYS,
    GROUPS,
    CommonState,
    identifier,
    inner_state,
)
from megatron.core.models.mimo.optimizer.state import prime
from megatron.core.optimizer import FP32Optimizer

_MODULES = "modules"


class WholeModelOptimizer(MimoOptimizer):
    """``MimoOptimizer`` whose checkpoints are those of one optimizer of the whole model.

    One rank writes what is not a tensor. Where modules are on ranks of their own, all ranks gather
    it first, those on which nothing is trained included.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self._disjoint:  # Megatron does not ask a stub for its state
            self.is_stub_optimizer = False

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **keywords: Any
    ) -> dict[Any, Any]:
        """State for ``dist_checkpointing``, under the keys of one optimizer of the whole model.

        Raises:
            UnsupportedError: (a ``RuntimeError``) a distributed optimizer's state by buckets, which
                are those of a module.
        """
        metadata = keywords.get("metadata") or {}
        kind = metadata.get("distrib_optim_sharding_type")
        if self.config.use_distributed_optimizer and kind != "fully_reshardable":
            raise UnsupportedError(
                f"the state of a distributed optimizer as {kind!r} belongs to one layout of "
                "modules; save it as 'fully_reshardable' (--dist-ckpt-optim-fully-reshardable)"
            )
        links: list[dict[str, Any]] = []
        for name in self._replica:
            for number, link in enumerate(links_of(self.module_infos[name].optimizer)):
                prime(link)
                state = link.sharded_state_dict(model_sharded_state_dict, is_loading, **keywords)
                while len(links) <= number:
                    links.append({_MODULES: {}})
                _join(links[number], name, link, state, is_loading=is_loading)
        if self._disjoint and not is_loading:
            _share(links)
        return links[0] if len(links) == 1 else dict(enumerate(links))

    @torch.no_grad()  # Megatron copies into fp32 parameters, leaves of the graph
    def load_state_dict(self, state_dict: Mapping[Any, Any]) -> None:
        """Load what was loaded into ``sharded_state_dict``.

        Raises:
            ConfigError: (a ``ValueError``) a module that is trained here has no state in it.
        """
        numbers = sorted(key for key in state_dict if isinstance(key, int))
        tensors = [state_dict] if _MODULES in state_dict else [state_dict[n] for n in numbers]
        for name in self._replica:
            for number, link in enumerate(links_of(self.module_infos[name].optimizer)):
                if number >= len(tensors) or name not in tensors[number].get(_MODULES, {}):
                    raise ConfigError(
                        f"the checkpoint holds no optimizer state of module {name!r}; load the "
                        "model without the optimizer (--no-load-optim), or freeze the modules that "
                        "were frozen then"
                    )
                once, own = CommonState.of(state_dict, link), tensors[number][_MODULES][name]
                link.load_state_dict(once.state_for(link, own, f"module {name!r}"))


def _join(
    whole: dict[str, Any], name: str, link: Any, state: dict[str, Any], *, is_loading: bool
) -> None:
    """Put one module's state into the whole, its parameter groups among those of others."""
    inner = inner_state(link, state)
    groups = inner.pop(GROUPS)
    told = {key: state.pop(key) for key in COMMON_KEYS if key in state}
    step = inner["state"].pop("common_step", None) if "state" in inner else None
    whole[_MODULES][name] = state
    if is_loading:
        return  # it comes from the file
    whole.update(told)
    common = whole if isinstance(link, FP32Optimizer) else whole.setdefault("optimizer", {})
    if step is not None:
        common.setdefault("state", {})["common_step"] = step
    _add_groups(common, groups)


def _add_groups(common: dict[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    known = common.setdefault(GROUPS, [])
    identifiers = [identifier(group) for group in known]
    for group in groups:
        plain = {key: value for key, value in group.items() if key != "params"}
        if identifier(plain) not in identifiers:
            known.append(deepcopy(plain))


def _share(links: list[dict[str, Any]]) -> None:
    """Let every rank know what is not a tensor of the modules of all ranks. Collective."""
    told = [{key: value for key, value in link.items() if key != _MODULES} for link in links]
    heard: list[list[dict[str, Any]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(heard, told)
    for number in range(max(map(len, heard))):
        if number == len(links):
            links.append({_MODULES: {}})
        for theirs in (one[number] for one in heard if len(one) > number):
            own, common = links[number], theirs.get("optimizer", theirs)
            for key in COMMON_KEYS:
                if key in theirs:
                    own.setdefault(key, theirs[key])
            inner = own.setdefault("optimizer", {}) if "optimizer" in theirs else own
            for name, value in common.get("state", {}).items():
                inner.setdefault("state", {}).setdefault(name, value)
            _add_groups(inner, common.get(GROUPS, []))
