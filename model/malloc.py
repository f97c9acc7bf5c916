"""Keep freed memory in the process: glibc gives large blocks back at once, and fresh pages cost more than the sums."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for this process; nothing happens with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _BYTES)
        mallopt(_MMAP_THRESHOLD, _BYTES)
