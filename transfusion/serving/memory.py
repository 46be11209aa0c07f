"""Memory that is free is returned to the operating system."""

import ctypes


def release_memory() -> None:
    """Called when a large object has been freed: glibc would keep its memory, hundreds of megabytes of a picture."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
