"""Whole batches in an order fixed by (seed, epoch), shared out to processes, resumable within an epoch."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from glai_lightning.checks import UserValueError


class SeededBatchSampler(Sampler[Tensor]):
    """Batches of row numbers; shuffled, the order is a function of the seed and the epoch alone.

    Lightning shards this sampler over W processes: process r gets every W-th batch from the r-th on. So the batches
    come in rounds of W, and the last round shares the rest evenly. Every row is read once an epoch, by one process, and
    no process waits for another. One process gets full batches, and the rest in the last. (Where fewer than W rows are
    left over, the last full round takes them, in batches larger by one row.)

    Args:
        num_rows: N, rows in the data.
        batch_size: rows in a batch.
        shuffle_seed: seed of the order, at least 0; ``None`` keeps the rows in their order.
        num_shards: W, processes that share the batches.

    Raises:
        ValueError: If there are fewer rows than processes.

    Example:
        >>> [len(rows) for rows in SeededBatchSampler(10, batch_size=4)]
        [4, 4, 2]
        >>> [len(rows) for rows in SeededBatchSampler(11, batch_size=4, num_shards=2)]
        [4, 4, 2, 1]
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle_seed: int | None = None, num_shards: int = 1) -> None:
        if num_rows < num_shards:
            raise UserValueError(
                f"Expected at least one row for each of {num_shards} processes, but got {num_rows} rows."
            )
        self.num_rows = num_rows
        self.shuffle_seed = shuffle_seed
        self.epoch = 0
        self._batch_sizes = _batch_sizes(num_rows, batch_size, num_shards)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0. Lightning calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batch_sizes)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle_seed is None:
            order = torch.arange(self.num_rows)
        else:
            # A spawn key, unlike a sum of seed and epoch, gives neighbouring seeds unrelated orders.
            seeds = np.random.SeedSequence(self.shuffle_seed, spawn_key=(self.epoch,))
            order = torch.from_numpy(np.random.default_rng(seeds).permutation(self.num_rows))
        yield from torch.split(order[: sum(self._batch_sizes)], self._batch_sizes)


class EqualBatchSampler(SeededBatchSampler):
    """Batches whose sizes differ by one at most, and never between the processes of a round.

    It is for losses that compare the samples of a batch, gather them from all processes, and mean nothing for the one
    or two samples that a last batch may be left with. Several processes get shuffled batches of one size, because
    Lightning shuffles the batches once more before it shares them out. An epoch then leaves out fewer rows than it has
    batches, others in every epoch. Without shuffling it leaves out fewer than W rows, and one process reads all rows.

    Args:
        num_rows, batch_size, shuffle_seed, num_shards: as of :class:`SeededBatchSampler`; ``batch_size`` is the most
            rows in a batch, at least 2, and ``num_rows`` at least two for each process.

    Example:
        >>> [len(rows) for rows in EqualBatchSampler(9, batch_size=4)]
        [3, 3, 3]
        >>> [len(rows) for rows in EqualBatchSampler(15, batch_size=4, num_shards=2)]
        [4, 4, 3, 3]
        >>> [len(rows) for rows in EqualBatchSampler(15, batch_size=4, num_shards=2, shuffle_seed=0)]
        [3, 3, 3, 3]
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle_seed: int | None = None, num_shards: int = 1) -> None:
        if num_rows < 2 * num_shards:
            raise UserValueError(
                f"Expected at least two rows for each of {num_shards} processes, but got {num_rows} rows: a batch of "
                "one has nothing to be compared with."
            )
        super().__init__(num_rows, batch_size, shuffle_seed=shuffle_seed, num_shards=num_shards)
        share = num_rows // num_shards
        # For batches of at most three rows, a round more could leave one of them with a single row.
        rounds = min(-(-share // batch_size), share // 2)
        surplus = share % rounds if num_shards == 1 or shuffle_seed is None else 0
        sizes = [share // rounds + (turn < surplus) for turn in range(rounds)]
        self._batch_sizes = [size for size in sizes for _ in range(num_shards)]


def _batch_sizes(num_rows: int, batch_size: int, num_shards: int) -> list[int]:
    full_rounds, rest = divmod(num_rows, batch_size * num_shards)
    if 0 < rest < num_shards:
        full_rounds -= 1
        rest += batch_size * num_shards
    last_round = [rest // num_shards + (shard < rest % num_shards) for shard in range(num_shards)] if rest else []
    return [batch_size] * (full_rounds * num_shards) + last_round


class EpisodeSampler(DistributedSampler[int]):
    """Numbers of episodes, shared out to the processes of a fit.

    Lightning leaves a ``DistributedSampler`` alone. It would repeat the evaluation episodes of any other sampler until
    every process has as many.

    Args:
        episodes: the episodes; their number is that of an epoch, at least one for each process.
        fresh: whether every epoch has episodes of its own, and every process as many: the epoch is rounded up to a
            multiple of the processes. Otherwise all epochs have the same ones, each in one process.
        num_replicas: processes that share the episodes.
        rank: which of them this is, from 0.

    Example:
        >>> [list(EpisodeSampler(range(5), fresh=False, num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
        >>> sampler = EpisodeSampler(range(5), fresh=True, num_replicas=2, rank=1)
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [7, 9, 11]
    """

    def __init__(self, episodes: Any, *, fresh: bool, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(episodes, num_replicas, rank, shuffle=False)
        if len(episodes) < num_replicas:
            raise UserValueError(
                f"Expected at least one episode for each of {num_replicas} processes, but got {len(episodes)} episodes."
            )
        self.fresh = fresh

    def __len__(self) -> int:
        episodes = len(self.dataset)  # type: ignore[arg-type]
        if self.fresh:
            return math.ceil(episodes / self.num_replicas)
        return len(range(self.rank, episodes, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        if not self.fresh:
            return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        in_epoch = len(self) * self.num_replicas
        first = self.epoch * in_epoch
        return iter(range(first + self.rank, first + in_epoch, self.num_replicas))


class BatchLoader(DataLoader[Any]):
    """A loader that can be resumed in the middle of an epoch: Lightning saves and restores its position.

    It reads in the process itself, without collation: a batch is one ``index_select`` a tensor. Where making a batch
    takes longer than that, ``num_workers`` processes, started anew for every epoch, make batches ahead.

    The position belongs to an epoch. Lightning asks for the iterator of a resumed fit before it says which
    epoch it resumes, and restores no position from a checkpoint taken between epochs. So nothing is decided
    before the first batch is asked for, and a position restored for one epoch means nothing to the next.

    Args:
        dataset: makes a batch of each item of the sampler. If it has a method ``set_epoch``, it is told the epoch
            before the first batch.
        sampler: yields what ``dataset`` makes a batch of, such as its rows.
        progress: returns the current epoch and the number of its batches that are done, from the one who counts them.
            Then a batch that was handed out when an exception struck is handed out again. By default the sampler knows
            the epoch, and a batch handed out is done.
        rows_per_batch: how many rows make a batch where a ``SequentialSampler`` names single rows:
            ``Trainer(overfit_batches=...)`` puts one in place of the sampler that it finds. ``None`` where an item is a
            batch already.
        **options: the other arguments of ``DataLoader``, which Lightning repeats when it replaces the sampler.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> def make_loader():
        ...     return BatchLoader(TensorDataset(torch.arange(6)), SeededBatchSampler(6, batch_size=2, shuffle_seed=0))
        >>> loader = make_loader()
        >>> first, *rest = [batch[0].tolist() for batch in loader]
        >>> next(iter(loader))[0].tolist() == first
        True
        >>> resumed = make_loader()
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch[0].tolist() for batch in resumed] == rest
        True
    """

    dataset: Any

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Any,
        progress: Callable[[], tuple[int, int]] | None = None,
        rows_per_batch: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(sampler, SequentialSampler) and rows_per_batch is not None:
            sampler = BatchSampler(sampler, rows_per_batch, drop_last=False)
        super().__init__(dataset, sampler=sampler, **{**options, "batch_size": None})
        self.progress = progress
        self.rows_per_batch = rows_per_batch
        self._epoch = 0
        self._position = 0
        self._restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing below runs before the first batch is asked for.
        if self.progress is not None:
            self._set_epoch(self.progress()[0])
        self._epoch = getattr(self.sampler, "epoch", 0)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._epoch)
        start = self._restored_position()
        for position, batch in enumerate(self._batches(start), start + 1):
            self._position = position
            yield batch

    def _batches(self, start: int) -> Iterator[Any]:
        rest = islice(self.sampler, start, None)
        if self.num_workers == 0:
            return (self.dataset[rows] for rows in rest)
        ahead: DataLoader[Any] = DataLoader(
            self.dataset,
            sampler=list(rest),
            batch_size=None,
            collate_fn=_uncollated,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            multiprocessing_context=self.multiprocessing_context,
        )
        return iter(ahead)

    def _set_epoch(self, epoch: int) -> None:
        # Lightning's sampler for several processes passes the epoch on to ours; the one for overfitting has none.
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _restored_position(self) -> int:
        restored, self._restored = self._restored, None
        if restored is None or restored["epoch"] != self._epoch:
            return 0
        if (restored["rows"], restored["batches"]) != (len(self.dataset), len(self)):
            raise UserValueError(
                f"Expected {restored['rows']} rows in {restored['batches']} batches, as in the checkpoint from the"
                f" middle of an epoch, but got {len(self.dataset)} rows in {len(self)} batches: resume with the same"
                " data, batch size and number of processes, or from a checkpoint saved in `on_train_epoch_end`."
            )
        return restored["position"]

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches that are done, and the rows and batches that an epoch has."""
        if self._restored is not None:
            return dict(self._restored)
        position = self._position
        if self.progress is not None:
            position = min(position, self.progress()[1])
        return {"epoch": self._epoch, "position": position, "rows": len(self.dataset), "batches": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the epoch of ``state_dict`` after the batches that were done in it.

        Args:
            state_dict: from :meth:`state_dict`. The next iteration raises ``ValueError`` if it is of the same
                epoch and the number of rows or batches has changed.

        Raises:
            ValueError: If it is not such a state.
        """
        for name in ("epoch", "position", "rows", "batches"):
            value = state_dict.get(name) if isinstance(state_dict, dict) else None
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserValueError(
                    f"Expected the state of the loader to hold `{name}`, an integer of at least 0, but got {value!r}."
                )
        self._restored = dict(state_dict)
        self._set_epoch(state_dict["epoch"])


def _uncollated(batch: Any) -> Any:
    return batch


def fit_progress(trainer: Any) -> tuple[int, int]:
    """Return the epoch of a running fit, and how many of its batches are done, for a :class:`BatchLoader`."""
    # With max_steps, a fit resumed from the end of an epoch tells samplers an epoch that is one ahead.
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.current_epoch, batches.processed
