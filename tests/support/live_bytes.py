"""How much memory of this process is in use by somebody, counted and not guessed from its size.

The resident size of an interpreter wanders by megabytes, because allocators keep what was freed.
What malloc and Python's own allocator have handed out does not.
"""

import ctypes
import gc
import sys

_BLOCK_BYTES = 64  # of Python's allocator, on average; larger objects come from malloc
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS.split())


def live_bytes() -> int:
    """What malloc's arenas, its mapped blocks and Python's small objects take, garbage excluded."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd) + _BLOCK_BYTES * sys.getallocatedblocks()
