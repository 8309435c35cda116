"""Embeddings of a frozen backbone on disk: computed once, in whole shards, and found by what they were made of."""

import hashlib
import json
import os
import pickle
import re
import types
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from tqdm import tqdm  # type: ignore[import-untyped]

from glai_lightning.checks import UserTypeError, UserValueError, expect_integer
from glai_lightning.datamodules.base import BaseDataModule
from glai_lightning.datamodules.splits import SPLITS
from glai_lightning.datamodules.tasksets import seed_generators

_MANIFEST = "manifest.json"
#: A crash costs at most about so many rows, or this part of a split: reading gets slower with the number of shards.
_ROWS, _MOST_SHARDS = 4096, 32
#: Rows of each split that tell whether a backbone is random.
_ROWS_EMBEDDED_TWICE = 8


def fill_cache(
    datamodule: pl.LightningDataModule,
    backbone: nn.Module,
    cache_dir: str | PathLike[str],
    *,
    views: int = 1,
    progress_bar: bool = True,
) -> Path:
    """Return the folder of the embeddings of a data module's inputs, computing those that are not there.

    Arguments and errors are those of ``FeaturesDataModule.from_backbone``. The folder holds ``x_train``, ``y_train``
    and likewise 'val' and 'test', in shards, and further draws of the training inputs as ``x_train_view1`` and so on.
    """
    expect_integer("views", views, least=1)
    _check_backbone(backbone)
    readers = _readers(datamodule)
    parts = [(split, view) for split in readers for view in range(views if split == "train" else 1)]
    digest = hashlib.sha256()
    _add_backbone(digest, backbone)
    for split, view in parts:
        _add(digest, (split, view, readers[split].batch_size))
        _add(digest, readers[split].source)
    folder = Path(cache_dir) / digest.hexdigest()[:32]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not _is_complete(folder):
        for split, reader in readers.items():
            _check_draws(split, reader, backbone, views=views if split == "train" else 1)
        _fill(folder, parts, readers, backbone, progress_bar)
    with suppress(OSError):
        # When it was last used, for pruning.
        os.utime(folder)
    return folder


def is_cache(path: Path) -> bool:
    """Whether a folder is one that ``fill_cache`` made, complete or not."""
    if not path.is_dir() or re.fullmatch(r"[0-9a-f]{32}", path.name) is None:
        return False
    names = [file.name for file in path.iterdir()]
    return all(name == _MANIFEST or ".npy" in name or name.startswith(f".{_MANIFEST}.") for name in names)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserValueError(
            f"Expected `cache_dir` to be a folder with room to write in, but cannot write '{path}': {error}. "
            "Shards that are complete are kept, and the next call computes the others."
        ) from error


class _Reader:
    """Inputs and targets of a split in the order of the data, a batch at a time, from any batch on."""

    def __init__(self, split: str, source: Any, batch_size: int, collate: Any = None) -> None:
        self.split, self.source, self.batch_size, self.collate = split, source, batch_size, collate

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int, view: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches of rows, drawn by the number of a view and their own."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(view)
        for first in range(start, stop, self.batch_size):
            rows = list(range(first, min(first + self.batch_size, stop)))
            with isolate_rng(include_cuda=False):
                seed_generators(view, (first,))
                batch = self.source[rows] if self.collate is None else self.collate([self.source[row] for row in rows])
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                raise UserTypeError(
                    f"Expected the batches of '{self.split}' to be pairs of inputs and a tensor of targets, but got "
                    f"{type(batch).__name__}."
                )
            yield batch[0], batch[1]


def _readers(datamodule: pl.LightningDataModule) -> dict[str, _Reader]:
    if isinstance(datamodule, type) or not callable(getattr(datamodule, "train_dataloader", None)):
        raise UserTypeError(f"Expected `datamodule` to be a LightningDataModule, but got {type(datamodule).__name__}.")
    if isinstance(datamodule, BaseDataModule):
        size = getattr(datamodule, "batch_size", 1)
        return {split: _Reader(split, datamodule.splits[split], size) for split in SPLITS if split in datamodule.splits}
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    readers = {}
    for split in SPLITS:
        try:
            loader = getattr(datamodule, f"{split}_dataloader")()
        except (MisconfigurationException, NotImplementedError):
            continue
        if loader is not None and not (isinstance(loader, list) and not loader):
            readers[split] = _reader_of_loader(split, loader)
    for split in ("train", "val"):
        if split not in readers:
            raise UserValueError(f"Expected `datamodule` to have a `{split}_dataloader`, but it has none.")
    return readers


def _reader_of_loader(split: str, loader: Any) -> _Reader:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise UserTypeError(
            f"Expected `{split}_dataloader` to return one DataLoader of a dataset with a length, in batches of a size, "
            f"but got {type(loader).__name__}."
        )
    sampler: Any = loader.sampler
    in_order = isinstance(sampler, SequentialSampler | DistributedSampler)
    shuffled = isinstance(sampler, RandomSampler) and not sampler.replacement
    if not in_order and not (shuffled and sampler.num_samples == len(sampler.data_source)):
        raise UserValueError(
            f"Expected the sampler of `{split}_dataloader` to draw every sample once, but got {type(sampler).__name__}."
        )
    return _Reader(split, loader.dataset, loader.batch_size, loader.collate_fn)


def _check_backbone(backbone: Any) -> None:
    if not isinstance(backbone, nn.Module):
        raise UserTypeError(f"Expected `backbone` to be a torch.nn.Module, but got {type(backbone).__name__}.")
    trainable = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    training = [name or type(module).__name__ for name, module in backbone.named_modules() if module.training]
    if trainable or training:
        what = f"trains {trainable[0]!r}" if trainable else f"has {training[0]!r} in train mode"
        raise UserValueError(
            f"Expected `backbone` to be frozen and in eval mode, but it {what}: call "
            "`backbone.requires_grad_(False).eval()`."
        )


def _check_draws(split: str, reader: _Reader, backbone: nn.Module, *, views: int) -> None:
    """Refuse inputs that differ from draw to draw where there is one view, and a backbone that is random itself."""
    if len(reader) == 0:
        raise UserValueError(f"Expected samples in '{split}', but got none.")
    stop = min(len(reader), reader.batch_size)
    (first, _), (again, _) = (next(reader.read(0, stop, view)) for view in (0, 1))
    if views == 1 and _digest_of(first) != _digest_of(again):
        raise UserValueError(
            f"Expected the inputs of '{split}' to be the same whenever they are read, but they are augmented at "
            "random: leave the augmentation out, or cache several draws of the training inputs with `views`."
        )
    few, _ = next(reader.read(0, min(stop, _ROWS_EMBEDDED_TWICE), 0))
    if not np.array_equal(_embed(backbone, few, seed=0), _embed(backbone, few, seed=1), equal_nan=True):
        raise UserValueError("Expected `backbone` to embed an input always alike, but it is random.")


def _embed(backbone: nn.Module, inputs: Any, seed: int = 0) -> np.ndarray:
    device = next((tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
    with torch.no_grad(), isolate_rng(include_cuda=False):
        seed_generators(seed, ())
        output = backbone(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise UserTypeError(f"Expected `backbone` to return embeddings (batch, D), but got {type(output).__name__}.")
    # numpy has no bfloat16.
    output = output.float() if output.dtype == torch.bfloat16 else output
    return output.flatten(1).cpu().numpy()


def _fill(
    folder: Path, parts: list[tuple[str, int]], readers: Mapping[str, _Reader], backbone: nn.Module, progress_bar: bool
) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    shards = []
    for split, view in parts:
        rows = max(_ROWS, len(readers[split]) // _MOST_SHARDS)
        size = max(1, rows // readers[split].batch_size) * readers[split].batch_size
        starts = range(0, len(readers[split]), size)
        shards += [(split, view, number, start, size) for number, start in enumerate(starts)]
    if not distributed:
        # Processes that fill one cache without knowing of each other begin at different shards.
        first = uuid.uuid4().int % len(shards)
        shards = shards[first:] + shards[:first]
    total = sum(min(size, len(readers[split]) - start) for split, _, _, start, size in shards)
    with tqdm(total=total, desc="Embedding", unit=" samples", disable=not progress_bar or rank > 0) as bar:
        for turn, (split, view, number, start, size) in enumerate(shards):
            reader, stop = readers[split], min(start + size, len(readers[split]))
            if turn % world == rank:
                _fill_shard(folder, reader, backbone, view, number, range(start, stop))
            bar.update(stop - start)
    if distributed:
        torch.distributed.barrier()
    if rank == 0:
        files = {path.name: _described(path) for path in sorted(folder.glob("*.npy"))}
        _write(folder / _MANIFEST, partial(_dump, {"files": files}))
    if distributed:
        torch.distributed.barrier()


def _fill_shard(folder: Path, reader: _Reader, backbone: nn.Module, view: int, number: int, rows: range) -> None:
    names = [f"x_{reader.split}_view{view}"] if view else [f"x_{reader.split}", f"y_{reader.split}"]
    paths = [folder / f"{name}-{number:05}.npy" for name in names]
    if all(_holds(path, len(rows)) for path in paths):
        return
    batches = [
        (_embed(backbone, inputs), targets.numpy()) for inputs, targets in reader.read(rows.start, rows.stop, view)
    ]
    # The targets of further draws are those of the first.
    for path, arrays in zip(paths, zip(*batches, strict=True), strict=False):
        _write(path, partial(np.save, arr=np.concatenate(arrays)))


def _holds(path: Path, rows: int) -> bool:
    """Whether a file is a whole shard of so many rows: it was given its name when it was complete."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) == rows
    except (OSError, ValueError, EOFError, TypeError):
        return False


def _write(path: Path, save: Any) -> None:
    """Write a file under another name and give it its own when it is complete: nothing half-written is ever read."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _dump(value: Any, file: Any) -> None:
    file.write(json.dumps(value).encode())


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "time": path.stat().st_mtime_ns, "sha256": digest}


def _is_complete(folder: Path) -> bool:
    """Whether all files are there as they were written; those that are not are removed, and so is their manifest."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["time"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    spoiled = [folder / name for name, entry in expected.items() if not _is_as_written(folder / name, *entry)]
    foreign = [path for path in folder.glob("*.npy") if path.name not in expected]
    for path in (*spoiled, *foreign):
        path.unlink(missing_ok=True)
    if spoiled:
        (folder / _MANIFEST).unlink(missing_ok=True)
    return not spoiled


def _is_as_written(path: Path, size: int, time: int, digest: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    return path.stat().st_mtime_ns == time or _described(path)["sha256"] == digest


def _add_backbone(digest: Any, backbone: nn.Module) -> None:
    _add(digest, (torch.__version__, torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
    _add(digest, str(torch.get_autocast_dtype("cpu")))
    _add(digest, backbone)


def _digest_of(value: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any, seen: tuple[int, ...] = ()) -> None:
    """Add to a hash what a value is: numbers, strings, the content of tensors and files, and the attributes of objects.

    A string or path that names a file counts with its size and time. An object that cannot be looked into raises
    ``TypeError``: its content could change without a trace.
    """
    if id(value) in seen:
        return
    inside = (*seen, id(value))
    digest.update(f"\n{type(value).__module__}.{type(value).__qualname__}:".encode())
    if isinstance(value, str | PathLike):
        digest.update(_named_file(str(value)).encode(errors="surrogatepass"))
    elif value is None or isinstance(value, bool | int | float | complex | bytes | torch.dtype | torch.device):
        digest.update(repr(value).encode())
    elif isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous()
        digest.update(f"{tuple(dense.shape)}{dense.dtype}".encode())
        digest.update(dense.flatten().view(torch.uint8).numpy().data if dense.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _add(digest, key, inside)
            _add(digest, value[key], inside)
    elif isinstance(value, set | frozenset):
        digest.update("".join(sorted(_digest_of(item) for item in value)).encode())
    elif isinstance(value, tuple | list | range | np.ndarray):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item, inside)
    elif isinstance(value, type):
        digest.update(value.__qualname__.encode())
    elif isinstance(value, types.CodeType):
        _add(digest, (value.co_code, value.co_names, value.co_consts), inside)
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _add(digest, (value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells), inside)
    elif isinstance(value, types.MethodType):
        _add(digest, (value.__func__, value.__self__), inside)
    elif isinstance(value, partial):
        _add(digest, (value.func, value.args, value.keywords), inside)
    elif isinstance(value, types.BuiltinFunctionType | types.ModuleType):
        digest.update(repr(getattr(value, "__qualname__", value.__name__)).encode())
    elif hasattr(value, "__dict__"):
        # What a draw of the last epoch left behind is no part of the data.
        attributes = {name: item for name, item in vars(value).items() if name not in ("epoch", "_drawn")}
        _add(digest, attributes, inside)
        kind: Any = type(value)
        digest.update(_digest_of_methods(kind))
    else:
        _add_pickled(digest, value)


@cache
def _digest_of_methods(kind: Any) -> bytes:
    """Return a hash of the code of a class: a forward that was changed embeds otherwise."""
    digest = hashlib.sha256()
    members = [member for each in kind.__mro__ for member in vars(each).values()]
    for function in (getattr(member, "__func__", getattr(member, "fget", member)) for member in members):
        if isinstance(function, types.FunctionType):
            _add(digest, function.__code__)
    return digest.digest()


def _add_pickled(digest: Any, value: Any) -> None:
    try:
        digest.update(re.sub(rb"0x[0-9a-f]+", b"", pickle.dumps(value)))
    except Exception as error:
        raise UserTypeError(
            f"Expected data and backbone of a cache to be something whose content can be told, but got a "
            f"{type(value).__name__} in it."
        ) from error


def _named_file(text: str) -> str:
    if os.sep in text and len(text) < 4096 and "\n" not in text and "\0" not in text and os.path.isfile(text):
        status = os.stat(text)
        return f"{text} {status.st_size} {status.st_mtime_ns}"
    return text
