"""Objects that ranks inherit are no longer counted, so that the pages that they lie in stay shared.

Whoever uses an object counts a reference, which writes to the object's page, and a forked process
then copies the page: half of what a short run copies. CPython does not count references to what
it holds for immortal (PEP 683), as it does None.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
from types import CodeType

import numpy

_IMMORTAL = 0xFFFFFFFF  # in the lower half of the count, the first eight bytes of an object


def make_immortal() -> int:
    """Lets what there is live for ever, uncounted.

    Returns:
        How many references lead to it; 0 where objects do not begin with a count of that kind.
    """
    if sys.implementation.name != "cpython" or sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return 0
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return 0
    tracked = gc.get_objects()
    held = gc.get_referents(*tracked)
    codes = [one for one in held if type(one) is CodeType]
    while codes:  # the collector does not see what code holds
        constants = [
            one for code in codes for one in (*code.co_consts, *code.co_names, *code.co_varnames)
        ]
        held += constants
        codes = [one for one in constants if type(one) is CodeType]
    objects = numpy.fromiter([*tracked, *held], dtype=object)
    addresses = _array(ctypes.c_int64, objects.ctypes.data, len(objects))
    first, last = int(addresses.min()), int(addresses.max())
    memory = _array(ctypes.c_uint32, first, (last - first) // 4 + 1)
    memory[(addresses - first) // 4] = _IMMORTAL
    return len(objects)


def _array(kind: type[ctypes._SimpleCData[int]], address: int, size: int) -> numpy.ndarray:
    return numpy.ctypeslib.as_array((kind * size).from_address(address))
