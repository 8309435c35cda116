"""The commands of ``glai`` that run a Trainer: Lightning's command line, with what it leaves to trip over removed."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.optim import Optimizer

from glai_lightning.callbacks import FitReport
from glai_lightning.cli.checkpoints import (
    KeepsBest,
    check_given,
    checkpoint_roots,
    find_checkpoint,
    find_named,
    saved_configuration,
)
from glai_lightning.cli.predict import PredictionWriter, is_inputs
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.modules.head_module import has_test, steps_per_batch


class GlaiCLI(LightningCLI):
    """Runs ``glai fit``, ``validate``, ``test`` and ``predict``, for any LightningModule and LightningDataModule.

    It differs from a plain ``LightningCLI`` in that

    - ``fit`` tests the best checkpoint afterwards, where there is test data, and prints the table of a ``FitReport``
      last;
    - loggers with the same folder and name share one version;
    - OneCycleLR and CyclicLR from ``--lr_scheduler`` are stepped after every batch;
    - checkpoints are read with ``weights_only=True``, unless ``--weights_only=false`` is given, and it is the
      configuration that says which classes are made, and not hyper-parameters in a checkpoint;
    - ``test`` and ``predict`` want a checkpoint, leave no folder of logs, and ``predict`` writes a file;
    - a scheduler that would be ignored, and a checkpoint that is not there or is none, are errors;
    - Lightning does not warn of what this package does on purpose.

    Args:
        arguments: what follows ``glai`` on the command line.
    """

    def __init__(self, arguments: list[str]) -> None:
        usages = {name: {"usage": f"glai {name} --config CONFIG [options]"} for name in self.subcommands()}
        super().__init__(
            LightningModule,
            save_config_kwargs={"overwrite": True},
            subclass_mode_model=True,
            parser_kwargs={"prog": "glai", **usages},
            args=arguments,
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--to", type=Path, default=Path("predictions.csv"), help="file for the predictions")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; ``main`` took them from the command line, so there are no others to warn about."""
        self.config = parser.parse_args(args)
        self._check_checkpoint(self.config["subcommand"], self.config[self.config["subcommand"]])

    @staticmethod
    def _check_checkpoint(command: str, config: Any) -> None:
        if command in ("test", "predict") and config.get("ckpt_path") is None:
            raise _without_checkpoint(command)
        if config.get("weights_only") is None:
            config["weights_only"] = True
        if config.get("ckpt_path") is not None:
            check_given(str(config["ckpt_path"]), weights_only=config["weights_only"])

    def _parse_ckpt_path(self) -> None:
        """Leave the hyper-parameters of a checkpoint alone: a file that comes from anywhere is to name no classes."""

    def before_instantiate_classes(self) -> None:
        """Refuse what would be ignored, or fail only after minutes."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        given = config.get("optimizer"), config.get("lr_scheduler")
        if given[0] is None and given[1] is not None:
            raise UserMisconfigurationError(
                "Expected `--lr_scheduler` to come with `--optimizer`, without which it has no effect, but got it "
                "alone. A module's own argument, as in `--model.lr_scheduler`, needs no other."
            )
        own = (config.get("model.init_args") or {}).get("lr_scheduler")
        if given[0] is not None and given[1] is None and own is not None:
            raise UserMisconfigurationError(
                "Expected `--optimizer` to come with `--lr_scheduler`, because it replaces both the optimizer and the "
                "scheduler of the module, but got it alone with a scheduler in the module's arguments."
            )
        if self.subcommand == "predict":
            self.predictions = PredictionWriter(Path(config.to))

    def after_instantiate_classes(self) -> None:
        """Find the checkpoint of an earlier run, if one is named, and let all loggers write into one folder."""
        arguments = self.config_init[self.subcommand]
        given = arguments.get("ckpt_path")
        if given in ("best", "last"):
            roots = checkpoint_roots(self.trainer)
            # As in Lightning, `fit --ckpt_path=last` may be given before there is anything to resume.
            may_be_none = self.subcommand == "fit" and given == "last"
            arguments["ckpt_path"] = (find_checkpoint if may_be_none else find_named)(given, roots)
        if self.subcommand != "fit":
            # They would leave a folder for each call, with nothing in it.
            self.trainer.loggers = []
        self._ignore_expected_warnings()
        # A logger takes the next free version when it is first asked for it. Asked before any of them has made its
        # folder, those with the same name take the same version.
        for logger in self.trainer.loggers:
            if logger.log_dir is not None and not os.path.exists(logger.log_dir):
                # CSVLogger warns that it deletes old logs, but here they are those of another logger of this run.
                warnings.filterwarnings(
                    "ignore", message=f"Experiment logs directory {re.escape(logger.log_dir)} exists"
                )

    def _ignore_expected_warnings(self) -> None:
        expected = [r"Checkpoint directory .* exists and is not empty", r"Couldn't infer the batch indices"]
        # The best one of a fit that is resumed is kept, see `KeepsBest`.
        expected.append(r"The dirpath has changed")
        for message in expected:
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; only a fit saves its configuration."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        return super().instantiate_trainer(**kwargs)

    def before_predict(self) -> None:
        """Write the predictions into a file."""
        self.trainer.callbacks.append(self.predictions)  # type: ignore[attr-defined]

    def after_predict(self) -> None:
        """Say where the predictions are."""
        print(f"Predictions of {self.predictions.num_inputs:,} inputs: {self.predictions.to}")

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Any | None = None
    ) -> Any:
        """Return what ``--optimizer`` and ``--lr_scheduler`` ask for."""
        if steps_per_batch(lr_scheduler):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    def before_fit(self) -> None:
        """Keep the tables for the end, and the best checkpoint of a fit that is resumed."""
        self.trainer.callbacks.insert(0, KeepsBest())  # type: ignore[attr-defined]
        for report in self._fit_reports():
            report.prints_at_fit_end = False

    def after_fit(self) -> None:
        """Test the best checkpoint, or the weights at the end where none was kept, and print the tables."""
        try:
            if has_test(self.model, self.datamodule):
                checkpoint = self._best_checkpoint()
                self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
        finally:
            for report in self._fit_reports():
                report.print_table()

    def _fit_reports(self) -> list[FitReport]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, FitReport)]  # type: ignore[attr-defined]

    def _best_checkpoint(self) -> str | None:
        for checkpoint in self.trainer.checkpoint_callbacks:
            path: str = getattr(checkpoint, "best_model_path", "")
            if getattr(checkpoint, "monitor", None) is not None and path:
                return path
        return None


def complete(arguments: list[str]) -> list[str]:
    """Add to the arguments of ``test``, ``validate`` and ``predict`` what follows from the checkpoint and the data.

    Args:
        arguments: what follows ``glai`` on the command line.

    Returns:
        The same, with the configuration that the fit saved beside its checkpoints where none is named, and the data
        module for a file or folder that is named as ``--data``.
    """
    command, *rest = arguments
    if command not in ("test", "validate", "predict"):
        return arguments
    checkpoint, data = _argument(rest, "--ckpt_path"), _argument(rest, "--data")
    if not any(argument.split("=")[0] in ("--config", "-c", "--model") for argument in rest):
        if checkpoint is None:
            raise _without_checkpoint(command)
        saved = saved_configuration(checkpoint)
        if saved is None:
            check_given(checkpoint, weights_only=True)
            raise UserMisconfigurationError(
                "Expected `--config` to name the configuration of the fit, because none lies beside the checkpoint "
                f"'{checkpoint}', but got none."
            )
        print(f"Configuration of the fit: {saved}")
        rest = ["--config", str(saved), *rest]
    if command == "predict" and data is not None and is_inputs(data):
        at = next(n for n, argument in enumerate(rest) if argument.split("=")[0] == "--data")
        rest[at : at + (1 if "=" in rest[at] else 2)] = [
            "--data=glai_lightning.datamodules.UnlabelledDataModule",
            f"--data.path={data}",
        ]
    return [command, *rest]


def _argument(arguments: list[str], name: str) -> str | None:
    for argument, following in zip(arguments, [*arguments, None][1:], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


def _without_checkpoint(command: str) -> UserMisconfigurationError:
    return UserMisconfigurationError(
        f"Expected `--ckpt_path` to name a checkpoint, or 'best' for that of the latest fit, but got none: "
        f"`glai {command}` would run on random weights."
    )
