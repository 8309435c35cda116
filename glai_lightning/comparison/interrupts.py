"""Interrupts from the keyboard at moments when Python would lose them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Context that lets an interrupt wait for its end.

    In a finaliser Python prints a KeyboardInterrupt and goes on. One that arrives while garbage is collected is raised
    in the first finaliser that runs, such as that of Lightning's profiler, and is lost there.

    Example:
        >>> import gc
        >>> with interrupts_deferred():
        ...     _ = gc.collect()
    """
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers; one that was not set from Python cannot be set again.
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        signal.raise_signal(signal.SIGINT)
