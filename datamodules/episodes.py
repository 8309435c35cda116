"""Episodes for few-shot learning, from labelled samples or from tasksets."""

from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer, listed
from glai_lightning.datamodules.arrays import (
    Standardisation,
    as_tensor,
    check_finite,
    require_keys,
    selectable,
)
from glai_lightning.datamodules.base import BaseDataModule, Splits, array_reader, expect_dataset, expect_one
from glai_lightning.datamodules.loader import EpisodeSampler
from glai_lightning.datamodules.splits import SPLITS, check_classes, check_disjoint, split_classes
from glai_lightning.datamodules.tasksets import NumberedEpisodes, TasksetEpisodes, check_class_sizes

#: More than any data holds, and few enough for 64-bit counters of the episodes of a long fit.
_MOST = 2**31
_SPLIT_KEYS = tuple(f"{name}_{split}" for split in SPLITS for name in ("x", "y"))


class EpisodesDataModule(BaseDataModule):
    """Episodes of ``ways`` classes with ``shots`` support and ``queries`` query samples each, from any labelled data.

    A batch is one episode: a dict of ``support``, ``support_labels``, ``query`` and ``query_labels``, where labels are
    those of the data. Classes that are trained on are neither validated nor tested on. Samples of shape (D,) are
    standardised column by column, images (height, width) or (channels, height, width) channel by channel, with the
    statistics of the training classes.

    The data is held in memory as it is stored (images as bytes, say), and an episode is cut out of it at once, without
    worker processes, whatever Lightning's warning about their number says. A ``dataset`` is read once, sample by
    sample: random transforms in it are drawn once, too. For data that does not fit into memory, and for augmentation,
    use :meth:`from_tasksets`.

    Episodes follow from the seed. Training episodes are new in every epoch, and each process of a distributed fit draws
    its own; a checkpoint holds the position. Evaluation episodes are the same in every epoch and for any number of
    processes, and each is evaluated by one of them.

    Args:
        path: an ``.npz`` file with ``x`` (N, ...) and ``y`` (N,), integers; or with ``x_train``, ``y_train``,
            ``x_val``, ``y_val``, ``x_test``, ``y_test``, taken as they are split unless ``classes`` is given. Nothing
            in it is unpickled.
        arrays: tensors or numpy arrays by key, instead of ``path``. They are not changed.
        dataset: a map-style dataset of pairs (tensor, integer), instead of ``path``.
        ways: classes in an episode, at least 2.
        shots: support samples of each class, at least 1.
        queries: query samples of each class, at least 1.
        train_episodes: episodes of an epoch, over all processes; rounded up to a multiple of these.
        eval_episodes: episodes to validate on, and to test on. The field reports 600 or more.
        classes: for each of 'train', 'val' and 'test' a fraction of the classes, or the list of them; by default 60, 20
            and 20 %. Validation and test may share classes, but not with training; the samples of a shared class are
            then divided between them.
        seed: of the classes where they are given by fractions, and of all episodes, at least 0.
        groups: key of an array that names the group of each class, in ascending order of their labels, or of each
            sample. Whole groups are shared out then, and ``classes`` counts or names groups: ``groups="alphabet"``.

    Raises:
        TypeError: If an argument is of the wrong type; from :meth:`setup`, if data is, or labels are no integers.
        ValueError: If not one of ``path``, ``arrays`` and ``dataset`` is given, an argument is out of its range, or
            there is no such file; from :meth:`setup`, if keys are missing, shapes do not fit each other, numbers are
            not finite, splits share classes (the message names them), a split has fewer classes than ways, or a class
            has fewer samples than shots plus queries (the message names it).

    Example:
        >>> arrays = {"x": torch.randn(300, 4), "y": torch.arange(300) % 15}
        >>> data = EpisodesDataModule(arrays=arrays, ways=3, shots=5, queries=10)
        >>> episode = next(iter(data.train_dataloader()))
        >>> episode["support"].shape, episode["query"].shape
        (torch.Size([15, 4]), torch.Size([30, 4]))
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        arrays: Mapping[str, Any] | None = None,
        # Without its parameter, because jsonargparse takes no subclass of a generic alias.
        dataset: Dataset | None = None,  # type: ignore[type-arg]
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_episodes: int = 100,
        eval_episodes: int = 600,
        classes: dict[str, float] | dict[str, list[int]] | dict[str, list[str]] | None = None,
        seed: int = 0,
        groups: str | None = None,
    ) -> None:
        super().__init__(seed=seed)
        expect_one(path=path, arrays=arrays, dataset=dataset)
        self._set_sizes(shots, queries, train_episodes, eval_episodes)
        expect_integer("ways", ways, least=2)
        if classes is not None:
            check_classes(classes)
        expect_dataset(dataset)
        if groups is not None and not isinstance(groups, str):
            raise UserTypeError(f"Expected `groups` to be the key of an array, but got {groups!r}.")
        if groups is not None and dataset is not None:
            raise UserValueError(
                "Expected `groups` to come with `path` or `arrays`, which hold them, but got a `dataset`."
            )
        optional = ("x", "y", *_SPLIT_KEYS, *(() if groups is None else (groups,)))
        of_dataset = partial(_read_dataset, dataset)
        self._read_arrays = array_reader(path, arrays, optional=optional) if dataset is None else of_dataset
        self._source = "`arrays`" if path is None else f"'{path}'"
        self.ways, self.classes, self.groups = ways, classes, groups

    @classmethod
    def from_tasksets(
        cls,
        train: Any,
        val: Any,
        test: Any,
        *,
        shots: int = 1,
        queries: int = 15,
        train_episodes: int = 100,
        eval_episodes: int = 600,
        seed: int = 0,
    ) -> "EpisodesDataModule":
        """Take episodes from tasksets, such as ``learn2learn.data.Taskset``, with the transforms that these have.

        A task is a pair of samples (n, ...) and labels (n,), as learn2learn's ``NWays``, ``KShots(k=shots + queries)``
        and ``LoadData`` make it. Of each class, in the order of the task, the first ``shots`` samples are the support
        and the next ``queries`` the query. Samples are taken as they come, not standardised. A taskset of a number of
        tasks (``num_tasks``) is read round and round. One without (``num_tasks=-1``) always has new tasks, and for
        evaluation the same ones in every epoch. Give each split a taskset of classes of its own: transforms may number
        the classes of a task anew, so that classes shared between splits cannot be seen here.

        Args:
            train: taskset to train on; indexable, with a length.
            val: taskset to validate on.
            test: taskset to test on.
            shots: support samples of each class.
            queries: query samples of each class.
            train_episodes: episodes of an epoch.
            eval_episodes: episodes to validate on, and to test on.
            seed: of the tasks: each is drawn with the global random number generators seeded by this and its number.

        Returns:
            The data module; nothing of it needs learn2learn.

        Raises:
            TypeError: If what is to be a taskset has no length or is not indexable, or a number is no integer.
            ValueError: If a number is out of its range; from the loaders, if a task has too few samples of a class.
        """
        data = cls.__new__(cls)
        BaseDataModule.__init__(data, seed=seed)
        data._set_sizes(shots, queries, train_episodes, eval_episodes)
        tasksets = {"train": train, "val": val, "test": test}
        for split, taskset in tasksets.items():
            if not hasattr(taskset, "__getitem__") or not hasattr(taskset, "__len__"):
                raise UserTypeError(
                    f"Expected the taskset `{split}` to have a length and to be indexable, "
                    f"but got {type(taskset).__name__}."
                )
        data._splits = Splits(
            {
                split: TasksetEpisodes(taskset, shots=shots, queries=queries, **data._numbers(split))
                for split, taskset in tasksets.items()
            }
        )
        return data

    @property
    def episodes(self) -> Mapping[str, Any]:
        """The episodes of 'train', 'val' and 'test', by number: ``data.episodes["test"][0]``."""
        return self.splits

    def _set_sizes(self, shots: int, queries: int, train_episodes: int, eval_episodes: int) -> None:
        sizes = {"shots": shots, "queries": queries, "train_episodes": train_episodes, "eval_episodes": eval_episodes}
        for name, size in sizes.items():
            expect_integer(name, size, least=1)
            if size > _MOST:
                raise UserValueError(f"Expected `{name}` to be at most {_MOST:,}, but got {size}.")
        self.shots, self.queries = shots, queries
        self.train_episodes, self.eval_episodes = train_episodes, eval_episodes

    def _numbers(self, split: str) -> dict[str, Any]:
        episodes = self.train_episodes if split == "train" else self.eval_episodes
        return {"episodes": episodes, "seeds": (self.seed, SPLITS.index(split))}

    def _loader_options(self, split: str, sharding: Mapping[str, int]) -> dict[str, Any]:
        return {"sampler": EpisodeSampler(self.episodes[split], fresh=split == "train", **sharding)}

    def _read(self) -> Splits:
        arrays = self._read_arrays()
        inputs, labels, rows = _labelled(arrays, self._source)
        if rows is not None and self.classes is None and self.groups is None:
            check_disjoint({split: torch.unique(labels[rows[split]]).tolist() for split in SPLITS})
        else:
            groups = None
            if self.groups is not None:
                require_keys(arrays, (self.groups,), self._source)
                given = arrays[self.groups]
                groups = np.asarray(as_tensor(self.groups, given) if isinstance(given, Tensor) else given)
            rows = split_classes(labels, self.classes, groups=groups, seed=self.seed)
        sizes: dict[str, Any] = {"ways": self.ways, "shots": self.shots, "queries": self.queries}
        for split in SPLITS:
            _check_episodes_fit(split, labels[rows[split]], **sizes)
        mean, scale = _statistics(inputs.index_select(0, rows["train"]))
        sources = {
            split: NumberedEpisodes(
                inputs, labels, rows[split], mean=mean, scale=scale, **sizes, **self._numbers(split)
            )
            for split in SPLITS
        }
        return Splits(sources, inputs.shape[1] if inputs.ndim == 2 else None)


def _read_dataset(dataset: Any) -> dict[str, Tensor]:
    pairs = [dataset[index] for index in range(len(dataset))]
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) < 2 or not isinstance(pair[0], Tensor):
            kind = type(pair[0]).__name__ if isinstance(pair, tuple | list) and pair else type(pair).__name__
            raise UserTypeError(
                f"Expected sample {index} of `dataset` to be a pair (tensor, label), but got `{kind}`: a dataset of "
                "images needs a transform that makes tensors of one shape."
            )
        if pair[0].shape != pairs[0][0].shape:
            raise UserValueError(
                f"Expected the samples of `dataset` to have one shape, but got {tuple(pairs[0][0].shape)} and, for "
                f"sample {index}, {tuple(pair[0].shape)}."
            )
    if not pairs:
        raise UserValueError("Expected `dataset` to hold samples, but it is empty.")
    return {"x": torch.stack([pair[0] for pair in pairs]), "y": torch.stack([torch.as_tensor(p[1]) for p in pairs])}


def _labelled(arrays: Mapping[str, Any], source: str) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    """Return inputs (N, ...) and labels (N,), and the rows of each split where the data has splits of its own."""
    if "x" in arrays or "y" in arrays or not any(key in arrays for key in _SPLIT_KEYS):
        require_keys(arrays, ("x", "y"), source)
        return (*_checked(arrays, "x", "y"), None)
    splits = [split for split in SPLITS if f"x_{split}" in arrays or f"y_{split}" in arrays]
    pairs = []
    for split in splits:
        require_keys(arrays, (f"x_{split}", f"y_{split}"), source)
        pairs.append(_checked(arrays, f"x_{split}", f"y_{split}"))
    shapes = {split: tuple(inputs.shape[1:]) for split, (inputs, _) in zip(splits, pairs, strict=True)}
    if len(set(shapes.values())) > 1:
        raise UserValueError(f"Expected samples of one shape in all splits, but got {shapes}.")
    ends = torch.tensor([len(labels) for _, labels in pairs]).cumsum(0).tolist()
    rows = {split: torch.arange(end - len(pair[1]), end) for split, pair, end in zip(splits, pairs, ends, strict=True)}
    inputs, labels = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    return inputs, labels, rows if len(splits) == len(SPLITS) else None


def _checked(arrays: Mapping[str, Any], x: str, y: str) -> tuple[Tensor, Tensor]:
    inputs, labels = as_tensor(x, arrays[x]), as_tensor(y, arrays[y])
    if inputs.ndim not in (2, 3, 4) or inputs.numel() == 0:
        raise UserValueError(
            f"Expected `{x}` to have the shape (samples, features), (samples, height, width) or (samples, channels, "
            f"height, width), none of them 0, but got {tuple(inputs.shape)}."
        )
    if labels.is_floating_point():
        raise UserTypeError(f"Expected `{y}` to hold integers, class labels, but got {labels.dtype}.")
    if labels.shape != (len(inputs),):
        raise UserValueError(
            f"Expected `{y}` to hold a label for each of {len(inputs)} samples, "
            f"but got the shape {tuple(labels.shape)}."
        )
    check_finite(x, inputs)
    inputs = selectable(inputs)
    # float64 is wider than what episodes come in.
    return inputs.float() if inputs.dtype == torch.float64 else inputs, labels.to(torch.int64)


def _check_episodes_fit(split: str, labels: Tensor, *, ways: int, shots: int, queries: int) -> None:
    classes, counts = torch.unique(labels, return_counts=True)
    if len(classes) < ways:
        raise UserValueError(
            f"Expected at least {ways} classes in '{split}' for episodes of {ways} ways, but got {len(classes)}: "
            f"{listed(classes.tolist()) or 'none'}."
        )
    check_class_sizes(f"in '{split}'", classes, counts, shots=shots, queries=queries)


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each column (D,), or of each channel, in the shape (channels, 1, 1)."""
    images = inputs.ndim > 2
    columns = inputs.unsqueeze(-1) if inputs.ndim == 3 else inputs.movedim(1, -1)
    standardise = Standardisation.fit(columns.reshape(-1, columns.shape[-1]) if images else inputs)
    mean, scale = standardise.mean.float(), standardise.scale.float()
    if inputs.ndim == 4:
        return mean[:, None, None], scale[:, None, None]
    return mean, scale
