"""HeadModule: any backbone with a pluggable head."""

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from glai_lightning.checks import UserTypeError, UserValueError, expect_flag
from glai_lightning.fitting.across_processes import process_group
from glai_lightning.fitting.conversion import follow_in_fit
from glai_lightning.fitting.embedded import Embedded
from glai_lightning.fitting.messages import hide_warnings, unhide_warnings
from glai_lightning.fitting.table_columns import TableColumns, table_of
from glai_lightning.heads.frozen import GLAIHead
from glai_lightning.heads.optimizers import optimizer_parameters
from glai_lightning.heads.restoring import HeadRestorer
from glai_lightning.heads.state_dicts import check_fits, check_state_dict
from glai_lightning.modules.checkpoint_file import DESCRIPTION, VERSION, check_checkpoint, described_modules
from glai_lightning.modules.deployment import deployed
from glai_lightning.modules.description import describe
from glai_lightning.modules.export import export_onnx
from glai_lightning.modules.standardise import Standardise

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler | ReduceLROnPlateau]

#: Lightning's warning of a frozen backbone, which is meant.
_IN_EVAL_MODE = r"Found \d+ module\(s\) in eval mode"
_PACKAGE, _MODULES = "glai_lightning", "glai_lightning.modules."


def shipped_module(name: object) -> "type[HeadModule] | None":
    """Return the module class of this package that a checkpoint names; ``None`` for a class of the user's own.

    Example:
        >>> shipped_module("glai_lightning.SupervisedModule").__name__
        'SupervisedModule'
    """
    package, _, kind = str(name).rpartition(".")
    found = getattr(importlib.import_module("glai_lightning.modules"), kind, None) if package == _PACKAGE else None
    return found if isinstance(found, type) and issubclass(found, HeadModule) else None


def steps_per_batch(scheduler: object) -> bool:
    """Tell whether a learning-rate scheduler is meant to be stepped after every batch, and not every epoch."""
    return isinstance(scheduler, OneCycleLR | CyclicLR)


def has_test(module: LightningModule, data: LightningDataModule | None) -> bool:
    """Tell whether there is a test step, and data to run it on."""
    holders = [holder for holder in (data, module) if holder is not None]
    return is_overridden("test_step", module) and any(is_overridden("test_dataloader", h) for h in holders)


class HeadModule(LightningModule):
    """A backbone, frozen or not, and a head on its embeddings; the base of the modules for particular tasks.

    Checkpoints of a frozen head load into a module with an MLP head and the reverse: ``load_from_checkpoint``, a
    resumed fit, validation, test and prediction need no callback for it.

    Args:
        head: any module from embeddings (batch, D) to outputs (batch, C); ``mlp_head`` makes one.
        backbone: any module from a batch of inputs to embeddings (batch, D); without one the inputs are the embeddings.
        freeze_backbone: whether the backbone stays in eval mode and gets no gradients.
        optimizer: makes the optimizer from an iterable of parameters.
        lr_scheduler: makes a learning-rate scheduler from the optimizer, if given. It is stepped once an epoch,
            OneCycleLR and CyclicLR once a step; ReduceLROnPlateau follows ``val/loss`` unless it names a ``monitor``.
        standardise_embeddings: whether the embeddings of a frozen backbone are standardised, a column at a time, by the
            statistics of the first batch of the fit. They travel in the checkpoint.

    Attributes:
        standardise: what standardises the inputs of the head, ``None`` where it cannot be told how many there are.
            Without a backbone the data module may standardise; its statistics are kept here for ``deployed``.
        inputs_standardised: whether the data module of the fit standardised the inputs.
        table: of a fit on a ``TableDataModule``, how rows of columns become inputs; travels in the checkpoint.

    Raises:
        TypeError: if an argument is not what it is to be.
    """

    def __init__(
        self,
        head: nn.Module,
        backbone: nn.Module | None = None,
        *,
        freeze_backbone: bool = True,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        standardise_embeddings: bool = True,
    ) -> None:
        super().__init__()
        for name, module in (("head", head), ("backbone", backbone)):
            if not isinstance(module, nn.Module) and not (module is None and name == "backbone"):
                raise UserTypeError(f"Expected `{name}` to be a module, but got {module!r}.")
        for name, factory in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if not callable(factory) and not (factory is None and name == "lr_scheduler"):
                raise UserTypeError(f"Expected `{name}` to be a function that makes one, but got {factory!r}.")
        expect_flag("freeze_backbone", freeze_backbone)
        expect_flag("standardise_embeddings", standardise_embeddings)
        # Only what a checkpoint can hold under `weights_only=True`.
        self.save_hyperparameters(ignore=["head", "backbone", "optimizer", "lr_scheduler"])
        self.head = head
        self.backbone = backbone
        self.freeze_backbone = freeze_backbone
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.standardise_embeddings = standardise_embeddings
        features = _count_inputs(head)
        self.standardise = None if features is None else Standardise(features)
        # Every process of a fit has the same statistics: DistributedDataParallel need not send them at every forward.
        self._ddp_params_and_buffers_to_ignore = [f"standardise.{name}" for name in ("mean", "scale", "rows")]
        self.inputs_standardised = False
        self.table: TableColumns | None = None
        self._described_head = describe(head)
        self._described_backbone: dict[str, Any] | None = None
        if backbone is not None and freeze_backbone:
            backbone.requires_grad_(False).eval()
        HeadRestorer.of(self, "head")

    def train(self, mode: bool = True) -> "HeadModule":
        """Set the mode of everything but a frozen backbone, which stays in eval mode."""
        super().train(mode)
        if self.backbone is not None and self.freeze_backbone:
            self.backbone.eval()
        return self

    def embeddings(self, x: Any) -> Tensor:
        """Return what the head is given: a batch of inputs -> (batch, D)."""
        if self.backbone is None:
            return x  # type: ignore[no-any-return]
        if not self.freeze_backbone:
            return self.backbone(x)  # type: ignore[no-any-return]
        with torch.no_grad():
            embeddings: Tensor = x.values if isinstance(x, Embedded) else self.backbone(x)
            if self.standardise is None or not self.standardise_embeddings:
                return embeddings
            if not self.standardise.is_set and self._trainer is not None and self._trainer.training:
                self.standardise.measure(embeddings, process_group(self._trainer))
            return self.standardise(embeddings)  # type: ignore[no-any-return]

    def forward(self, x: Any) -> Tensor:
        """Return the outputs of the head: a batch of inputs -> (batch, C)."""
        return self.head(self.embeddings(x))  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Check that the head fits the data; let a resumed fit load a frozen head as the MLP that is optimized.

        Raises:
            ValueError: if there is no backbone, and the head takes another number of features than the data module has.
        """
        restorer = HeadRestorer.of(self, "head")
        restorer.deferred = stage == "fit"
        restorer.forget()
        data = getattr(self.trainer, "datamodule", None)
        features = getattr(data, "num_features", None)
        in_features = _count_inputs(self.head)
        if self.backbone is None and isinstance(features, int) and in_features not in (None, features):
            raise UserValueError(
                f"Expected the head to take the {features} features of the data, but got a head for {in_features}."
            )
        if stage == "fit":
            self.take_data(data)

    def take_data(self, data: Any) -> None:
        """Keep what a data module does to the inputs before the head is given them."""
        self.inputs_standardised, statistics = _standardisation_of(data, self.standardise)
        self.table = table_of(data)
        if self.backbone is None and self.standardise is not None:
            self.standardise.copy_from(statistics)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Make a module from a checkpoint, as Lightning does, but with ``weights_only=True`` unless told otherwise.

        Args:
            checkpoint_path: a file, an address or a file-like object.
            map_location: where to put tensors, see ``torch.load``.
            hparams_file: hyper-parameters to take instead of those in the checkpoint.
            strict: whether all keys must fit; by default as ``strict_loading`` of the module says.
            weights_only: ``False`` executes what a checkpoint holds; for files that you trust.
            **arguments: arguments to take instead of those in the checkpoint. It describes heads and backbones that are
                made of layers of ``torch.nn`` or come from this package; others are to be given, ``head`` and
                ``backbone``.

        Returns:
            The module, with a frozen head where the checkpoint holds one.

        Raises:
            ValueError: if the file is no checkpoint, or is cut short, or holds more than tensors and primitives, or
                does not describe a head or a backbone that is not given.

        Example:
            >>> import tempfile
            >>> from glai_lightning import mlp_head
            >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
            ...     HeadModule.load_from_checkpoint(file.name, head=mlp_head(4, 8, 3))  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            glai_lightning.checks.UserValueError: Expected '...' to be a checkpoint, but it is none, or is cut short.
        """
        weights_only = weights_only is None or weights_only
        local = isinstance(checkpoint_path, str | PathLike) and os.path.isfile(checkpoint_path)
        needed = ({"head", "backbone"} & inspect.signature(cls).parameters.keys()) - arguments.keys()
        if local and (weights_only or "head" in needed):
            check_checkpoint(checkpoint_path)
            arguments |= described_modules(checkpoint_path, needed)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=weights_only, **arguments
        )

    def description(self) -> dict[str, Any]:
        """Return what ``load_from_checkpoint`` makes the module of, in primitives and tensors, weights apart."""
        if not isinstance(self.head, GLAIHead):
            self._described_head = describe(self.head)
        if self.backbone is not None and self._described_backbone is None:
            self._described_backbone = describe(self.backbone)
        return {
            "version": VERSION,
            "module": f"{_PACKAGE}.{type(self).__name__}" if type(self).__module__.startswith(_MODULES) else None,
            "head": self._described_head,
            "backbone": self._described_backbone,
            "has_backbone": self.backbone is not None,
            "inputs_standardised": self.inputs_standardised,
            "table": None if self.table is None else self.table.as_dict(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put into a checkpoint what ``load_from_checkpoint`` makes the module of."""
        checkpoint[DESCRIPTION] = self.description()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out of a checkpoint what is known of the inputs.

        Raises:
            ValueError: if the checkpoint is one of another module of this package.
        """
        described = checkpoint.get(DESCRIPTION, {})
        saved = shipped_module(described.get("module"))
        if saved is not None and not (isinstance(self, saved) or issubclass(saved, type(self))):
            raise UserValueError(
                f"Expected the checkpoint of a `{type(self).__name__}`, but got one of a `{saved.__name__}`."
            )
        self.inputs_standardised = bool(described.get("inputs_standardised", False))
        table = described.get("table")
        self.table = None if table is None else TableColumns.from_dict(table)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict from either side of the freeze, completely or not at all.

        Args:
            state_dict: entries and metadata of a module with an MLP head or a frozen one.
            strict: whether every key must be there, and no other.
            assign: whether to take over the tensors instead of copying them.

        Returns:
            The missing and the unexpected keys.

        Raises:
            TypeError: if ``state_dict`` is not a mapping.
            ValueError: if it is not built like a state dict, its head is not whole, or is of other sizes.
            RuntimeError: if other keys or shapes are not those of this module. In either case it is as it was.
        """
        check_state_dict(state_dict)
        check_fits(self, state_dict, strict=strict, heads={"head": self.head})
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def deployed(self) -> nn.Module:
        """Return the module as it is used once it is trained: from inputs as they come to the outputs of the head.

        Rows are standardised as the data module of the fit did. Nothing is copied; ``glai_lightning.modules.export``
        writes it to files of several kinds.

        Raises:
            ValueError: if a data module standardised what the backbone is given, which this module does not know.
        """
        return deployed(self)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Write the deployed module as ONNX, for any batch size.

        Args:
            file_path: the file; without one the program is only returned.
            input_sample: a batch of inputs as they come; made up for rows, and for backbones of this package.
            **kwargs: for ``torch.onnx.export``.

        Raises:
            ValueError: if a sample is needed, or the module cannot be exported.
        """
        return export_onnx(self, file_path, input_sample, **kwargs)

    def on_fit_start(self) -> None:
        """Freeze the head again, where the fit resumes from after the freeze without the callback."""
        still = [name for name, module in self.named_modules() if not module.training]
        if all(name.startswith(("backbone", "head")) for name in still):
            hide_warnings(_IN_EVAL_MODE)
        restorer = HeadRestorer.of(self, "head")
        restorer.deferred = False
        if restorer.pending:
            follow_in_fit(self.trainer, restorer.restore(self))

    def on_train_start(self) -> None:
        """Show warnings of other modules in eval mode again."""
        unhide_warnings(_IN_EVAL_MODE)

    def on_train_epoch_start(self) -> None:
        """Put a frozen backbone back in eval mode, should anything have changed that."""
        if self.backbone is not None and self.freeze_backbone:
            self.backbone.eval()

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler if there is one, for all that is trained."""
        optimizer = self.optimizer(self._optimizer_parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        interval = "step" if steps_per_batch(scheduler) else "epoch"
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", None) or "val/loss"
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _optimizer_parameters(self) -> list[nn.Parameter]:
        # A head that is frozen already keeps the positions that its parameters have in a fit that froze it.
        in_head = {id(parameter) for parameter in self.head.parameters()}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_head]
        if isinstance(self.head, GLAIHead):
            return [*optimizer_parameters(self.head), *rest]
        return [*(p for p in self.head.parameters() if p.requires_grad), *rest]


def _count_inputs(head: nn.Module) -> int | None:
    own = getattr(head, "in_features", None)
    if isinstance(own, int):
        return own
    first = next((module for module in head.modules() if isinstance(module, nn.Linear | nn.Flatten)), None)
    return first.in_features if isinstance(first, nn.Linear) else None


def _standardisation_of(data: Any, standardise: Standardise | None) -> tuple[bool, tuple[Tensor, Tensor] | None]:
    """Tell whether a data module standardises its inputs, and by which mean and deviation of the head's inputs."""
    found = getattr(data, "standardisation", None) or getattr(getattr(data, "splits", None), "standardisation", None)
    mean, scale = getattr(found, "mean", None), getattr(found, "scale", None)
    if not (isinstance(mean, Tensor) and isinstance(scale, Tensor)):
        return False, None
    fits = standardise is not None and mean.shape == scale.shape == standardise.scale.shape
    return True, (mean, scale) if fits else None
