"""The most memory that a piece of work takes."""

from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def watch_peak_memory(device: torch.device) -> None:
    """Start to watch for the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # 5 lowers the peak of resident memory to what is resident now, see proc(5).
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory in use since ``watch_peak_memory``.

    Returns:
        Bytes allocated on a GPU, else bytes resident in the process; ``None`` where the system does not tell.

    Example:
        >>> watch_peak_memory(torch.device("cpu"))
        >>> taken = torch.ones(4_000_000)
        >>> peak = peak_memory_bytes(torch.device("cpu"))
        >>> peak is None or peak > taken.nbytes
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _CLEAR.exists():
        return None
    lines = _STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
