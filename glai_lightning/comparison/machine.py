"""What a comparison was run on."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch


def processor_name() -> str:
    """Return the model of the processors."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if named:
            return named.group(1).strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str | int]:
    """Return what timings depend on beside the code: processors, threads, GPU, versions.

    Example:
        >>> sorted(describe_machine())
        ['cores', 'gpu', 'lightning', 'processor', 'python', 'system', 'threads', 'torch']
    """
    return {
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
    }
