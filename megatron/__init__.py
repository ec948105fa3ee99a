"""The part of the shared ``megatron`` namespace that belongs to megatron-mimo.

``megatron`` is shared by several distributions (megatron-core, megatron-energon, ...), none of
which ships this file. Owning it lets megatron-mimo answer for one module,
``megatron.core.models.mimo``, without writing into the folder that megatron-core owns:

* ``__path__`` lists every folder called ``megatron`` on ``sys.path``, in the order of ``sys.path``,
  exactly as the namespace would: a Megatron-LM checkout put first on PYTHONPATH comes first.
* One meta-path finder answers for the one name ``megatron.core.models.mimo``, always with this
  project's library; modules below it follow the package's own ``__path__``. Every other import
  passes it by for the price of one string comparison.

``MEGATRON_MIMO_OVERLAY=0``, set before ``megatron.core.models.mimo`` is first imported, gives the
MIMO that megatron-core (or whatever tree comes first) ships. Unset, empty or ``1`` gives this one.

Python runs only the first ``megatron/__init__.py`` on ``sys.path``. Where another distribution has
one and comes earlier, this file does not run and ``megatron.core.models.mimo`` is megatron-core's.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder

_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = "megatron.core.models.mimo"
_SWITCH = "MEGATRON_MIMO_OVERLAY"


class _Portions(Sequence[str]):
    """The folders of the ``megatron`` namespace, read from ``sys.path`` each time it is asked.

    Portions that appear on ``sys.path`` later are found, as in a namespace without ``__init__``.
    Asking costs some microseconds per entry and happens once per direct child of ``megatron``.
    Going through ``PathFinder`` covers zip files and the path hooks of editable installs.
    """

    def __iter__(self) -> Iterator[str]:
        found: dict[str, None] = {}  # a set that keeps the order
        for entry in sys.path:
            spec = PathFinder.find_spec(__name__, [entry])
            found.update(dict.fromkeys((spec and spec.submodule_search_locations) or ()))
        found.setdefault(_HERE)  # stays when its entry has left sys.path or was relative
        return iter(found)

    # Takes slices too; saying so in types needs ``typing``, which this file has no other use for.
    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return list(iter(self))[index]

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(list(iter(self)))


class _LibraryFinder:
    """Answers for ``megatron.core.models.mimo`` and for nothing else."""

    owner = "megatron-mimo"  # how a second execution of this file recognises the first one's finder

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of this project's library, or None for any other name.

        Raises:
            ValueError: MEGATRON_MIMO_OVERLAY has a value that is neither 0 nor 1.
            ModuleNotFoundError: megatron-core, which the library stands on, is not installed.
        """
        if fullname != _LIBRARY:
            return None
        switch = os.environ.get(_SWITCH, "")
        if switch not in ("", "0", "1"):
            raise ValueError(
                f"{_SWITCH}={switch!r} is not understood; set 0 for the MIMO that megatron-core "
                f"ships, or 1 (the same as unset) for the one of megatron-mimo"
            )
        if switch == "0":
            return None
        if getattr(sys.modules.get("megatron.core"), "__file__", None) is None:
            raise ModuleNotFoundError(
                f"{_LIBRARY} needs megatron-core, which is not installed for {sys.executable}; "
                "install it with: pip install 'megatron-core>=0.19,<0.20'",
                name="megatron.core",
            )
        # A wheel keeps the library in a folder of its own (see setup.py); a checkout, in place.
        parents = (
            os.path.join(_HERE, "mimo", "_overlay"),
            os.path.join(_HERE, "core", "models"),
        )
        return PathFinder.find_spec(fullname, parents)


__path__ = _Portions()  # type: ignore[assignment]  # the import system only iterates over it
sys.meta_path[:] = [
    finder for finder in sys.meta_path if getattr(finder, "owner", None) != _LibraryFinder.owner
]
sys.meta_path.insert(0, _LibraryFinder)
