"""Functions run in several processes at once, which form a ``torch.distributed`` group over gloo."""

import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_in_processes(function, folder, count=2):
    """Return what ``function(rank)`` returned in each process, or the exception that it raised."""
    context = multiprocessing.start_processes(_run, (function, folder, count), count, join=False, start_method="fork")
    while not context.join(timeout=60):
        pass
    return [torch.load(folder / f"returned{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank, function, folder, count):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=30))
    try:
        returned = function(rank)
    except Exception as error:
        traceback.print_exc()
        returned = error
    torch.save(returned, folder / f"returned{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
