"""Fits that are cut in every way there is, and what they leave behind."""

import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Ends a fit in a hook, once it has taken a number of optimizer steps or reached the end of an epoch.

    Args:
        kind: 'exception', 'SIGTERM' (Lightning ends the fit after the batch) or 'SIGKILL' (nothing is cleaned up).
        hook: name of the callback hook.
        step: optimizer steps taken by then.
    """

    kind: str
    hook: str
    step: int


class InterruptionError(RuntimeError):
    """The exception of a cut."""


class Interruption(Callback):
    """Cuts the fit that it is part of, once."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        setattr(self, cut.hook, self._strike)

    def _strike(self, trainer, *args):
        if trainer.global_step != self.cut.step or trainer.sanity_checking:
            return
        if self.cut.kind == "exception":
            raise InterruptionError
        os.kill(os.getpid(), getattr(signal, self.cut.kind))


class Series(Logger):
    """Keeps everything that is logged, in its order."""

    name = version = "series"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {name: float(metrics[name]) for name in sorted(metrics)}))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Outcome(Callback):
    """Notes how a fit ends, and writes it to a file for each process."""

    def __init__(self, file: str, freeze) -> None:
        self.file, self.freeze = file, freeze
        self.whole_epochs: list[int] = []
        self.frozen_from: int | None = None

    def on_train_epoch_start(self, trainer, pl_module):
        self.whole_epochs.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, *args):
        if self.freeze.frozen and self.frozen_from is None:
            self.frozen_from = trainer.global_step

    def on_train_end(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        freeze = self.freeze
        ended = {
            "weights": pl_module.state_dict(),
            "requires_grad": {name: p.requires_grad for name, p in pl_module.named_parameters()},
            "optimizer": optimizer.state_dict(),
            "rates": [group["lr"] for group in optimizer.param_groups],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "steps": trainer.global_step,
            "freeze": [freeze.frozen, freeze.freeze_epoch, freeze.freeze_reason, freeze.churn_history],
        }
        noted = {"logged": trainer.logger.rows, "whole_epochs": self.whole_epochs, "frozen_from": self.frozen_from}
        torch.save({"ended": ended, **noted}, f"{self.file}.{trainer.global_rank}")


def logged_in(outcome, epochs):
    """Return what was logged in some epochs."""
    return [row for row in outcome["logged"] if row[1].get("epoch") in epochs]


def differences(one, other, where="") -> list[str]:
    """List the places in which two nests of tensors and primitives are not the same to the last bit."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [where]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, pair in pairs for found in differences(*pair, f"{where}/{place}")]
    return [] if one == other else [where]


def mismatches(whole, resumed) -> list[str]:
    """List in what a resumed fit differs from the one that was never cut."""
    epochs = resumed["whole_epochs"]
    found = differences(whole["ended"], resumed["ended"])
    return found + differences(logged_in(whole, epochs), logged_in(resumed, epochs), "/logged")


def in_processes(run, count: int = 1, seconds: int = 60) -> list[int]:
    """Run a function in processes forked from this one, started as ``torchrun`` starts them if there are several.

    Returns:
        Their exit codes: 0, or 1 for an exception, or the negative number of the signal that killed them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_in_process, args=(run, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _in_process(run, rank: int, count: int, port: int) -> None:
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    try:
        run()
    except InterruptionError:
        os._exit(1)
    except SystemExit:
        os._exit(143)
    os._exit(0)
