"""``glai compare``: a comparison of the fit that a YAML configuration describes."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from glai_lightning.callbacks.structure_freeze import StructureFreezeCallback
from glai_lightning.cli.lightning_cli import GlaiCLI
from glai_lightning.comparison.heads import HEADS
from glai_lightning.comparison.protocol import RUNS_FILE, compare, quiet
from glai_lightning.comparison.report import text_report
from glai_lightning.comparison.variants import DEFAULT_VARIANTS
from glai_lightning.comparison.verdict import Comparison, Outcome
from glai_lightning.fitting.fit_record import Mode
from glai_lightning.fitting.heads_in_module import is_pattern
from glai_lightning.fitting.misconfiguration import UserMisconfigurationError
from glai_lightning.solvers import LogisticSolver, RidgeSolver

#: Exit codes of ``glai compare`` by outcome; errors have 1, arguments that cannot be parsed 2.
EXIT_CODES: dict[Outcome, int] = {"faster": 0, "no difference": 3, "slower": 4, "worse": 4}

_DESCRIPTION = (
    "Measure, on the fit that a YAML configuration describes, freezing the structure of the head against never "
    "freezing it: the same data, batches, optimizer and schedule, seed by seed. The same command continues a "
    "comparison that was interrupted. Exit codes: 0 faster and not worse, 3 no difference, 4 slower or worse; 1 an "
    "error, 2 arguments that cannot be parsed."
)
_SETTINGS = (
    "seeds",
    "variants",
    "heads",
    "score",
    "mode",
    "test_score",
    "head",
    "patience",
    "solver",
    "to",
    "margin",
    "threads",
)


class ComparisonCLI(GlaiCLI):
    """Parses the arguments of ``glai compare``, and makes the parts of the fit that they describe, once for each run.

    Args:
        arguments: what follows ``glai compare`` on the command line.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        LightningCLI.__init__(
            self,
            LightningModule,
            subclass_mode_model=True,
            save_config_callback=None,
            parser_kwargs={
                "prog": "glai compare",
                "usage": "glai compare --config CONFIG [options]",
                "description": _DESCRIPTION,
            },
            load_from_checkpoint_support=False,
            args=list(arguments),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a comparison has beside a fit."""
        add = parser.add_argument
        add("--seeds", type=int, default=5, help="number of seeds; they begin at `seed_everything`, or at 0")
        add(
            "--variants",
            type=str | list[str] | None,
            default=None,
            help=f"what to compare, with commas between; without `heads` {','.join(DEFAULT_VARIANTS)}",
        )
        add(
            "--heads",
            type=str | list[str],
            default=[],
            help=f"heads at equal parameters, each never frozen, and frozen and solved; there are {','.join(HEADS)}",
        )
        add(
            "--score",
            type=str | None,
            default=None,
            help="validation score; by default what a checkpoint monitors",
        )
        add("--mode", type=Literal["min", "max"] | None, default=None, help="whether the best score is the largest")
        add("--test_score", type=str | None, default=None, help="test score; by default `score` with 'test' for 'val'")
        add("--head", type=str | None, default=None, help="name of the head; by default that of the callback")
        add("--patience", type=int | None, default=3, help="of early stopping, in validations; null for none")
        add(
            "--solver",
            type=LogisticSolver | RidgeSolver | None,
            default=None,
            help="what to solve with; by default the solver of the callback, or one for the loss of the module",
        )
        add("--margin", type=float, default=0.003, help="difference in score up to which a variant is not worse")
        add("--threads", type=int | None, default=1, help="threads that compute on the CPU; null to leave them alone")
        add("--to", type=Path | None, default=None, help="folder for the results")
        # A configuration that `glai fit` has saved holds these too.
        parser.add_method_arguments(
            Trainer, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and take the seed for the first of the comparison."""
        self.config = parser.parse_args(args)
        given = self.config.seed_everything
        # `True` stands for a seed drawn at random, with which no comparison could be gone on with.
        self.config.seed_everything = 0 if isinstance(given, bool) else given

    def instantiate_classes(self) -> None:
        """Leave that to each run."""

    def after_instantiate_classes(self) -> None:
        """Nothing is there yet."""

    def make_fit(self, seed: int) -> tuple[Any, Any, Any]:
        """Return module, data module and Trainer for a seed; a data module that has a seed is given it too."""
        config = self.config.clone()
        if config.get("data") is not None and "seed" in config.data.get("init_args", {}):
            config.data.init_args.seed = seed
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()
        if config.get("optimizer") is not None:
            self.model.configure_optimizers = self._configure_when_asked
        return self.model, self.datamodule, self.trainer

    def _configure_when_asked(self) -> Any:
        # Lightning's command line makes the optimizer along with the module, before a variant has changed its head.
        del self.model.configure_optimizers
        self._add_configure_optimizers_method_to_model(None)
        return self.model.configure_optimizers()

    def configuration(self) -> dict[str, Any]:
        """Return what is fitted, in what JSON can hold, without what belongs to the comparison alone."""
        config = self.config.clone()
        for name in ("config", "seed_everything", "ckpt_path", "weights_only", *_SETTINGS):
            config.pop(name, None)
        dumped: dict[str, Any] = json.loads(
            self.parser.dump(config, skip_none=True, skip_validation=True, format="json")
        )
        for name in ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary"):
            dumped.get("trainer", {}).pop(name, None)
        return dumped


def run_comparison(arguments: Sequence[str]) -> int:
    """Run ``glai compare``.

    Args:
        arguments: what follows ``glai compare`` on the command line.

    Returns:
        The exit code: 0 if freezing the structure is faster and not worse, 3 for no difference, 4 if it is slower or
        worse.

    Raises:
        MisconfigurationException: if the comparison cannot be made.
        SystemExit: for arguments that cannot be parsed, and when the comparison is interrupted.
    """
    return EXIT_CODES[compare_configuration(arguments).verdict.outcome]


def compare_configuration(arguments: Sequence[str]) -> Comparison:
    """Compare the fit that arguments describe, print the tables, and return the comparison.

    Args:
        arguments: what follows ``glai compare`` on the command line.

    Raises:
        MisconfigurationException: if the comparison cannot be made.
        SystemExit: for arguments that cannot be parsed, and when the comparison is interrupted.
    """
    with quiet():
        return _compare(ComparisonCLI(arguments))


def _compare(cli: ComparisonCLI) -> Comparison:
    config = cli.config
    if config.get("ckpt_path") is not None:
        raise UserMisconfigurationError(
            f"Expected every fit of a comparison to start from the beginning, but got the checkpoint "
            f"'{config.ckpt_path}' to go on from."
        )
    *_, trainer = cli.make_fit(config.seed_everything)
    score, mode = _find_score(config, trainer)
    folder = config.to or _default_folder(config)
    try:
        comparison = compare(
            cli.make_fit,
            score=score,
            mode=mode,
            to=folder,
            head=config.head or _find_head(trainer),
            variants=config.variants,
            heads=config.heads,
            seeds=config.seeds,
            first_seed=config.seed_everything,
            patience=config.patience,
            test_score=config.test_score,
            solver=cli.config_init.get("solver"),
            margin=config.margin,
            threads=config.threads,
            config=cli.configuration(),
        )
    except (KeyboardInterrupt, SystemExit):
        runs = folder / RUNS_FILE
        print(f"Interrupted. Finished runs are in '{runs}': the same command goes on from there.", file=sys.stderr)
        raise
    print(f"{text_report(comparison)}\n\nTables, plots and all runs: {folder}")
    return comparison


def _find_score(config: Namespace, trainer: Any) -> tuple[str, Mode]:
    """Return the validation score and its mode, as given, or as a checkpoint or early stopping has them."""
    monitoring = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    monitored = {
        callback.monitor: callback.mode for callback in reversed(monitoring) if getattr(callback, "monitor", "")
    }
    score = config.score or next(reversed(monitored), None)
    if score is None:
        raise UserMisconfigurationError(
            "Expected `--score` and `--mode` to name the validation score, because no ModelCheckpoint or EarlyStopping "
            "of the configuration monitors one, but got neither."
        )
    mode = config.mode or monitored.get(score)
    if mode is None:
        raise UserMisconfigurationError(
            f"Expected `--mode` to say whether the best {score!r} is the largest ('max') or the smallest ('min'), but "
            "got None."
        )
    return score, mode


def _find_head(trainer: Any) -> str:
    heads = [callback.head for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]
    if not heads:
        return "head"
    if not isinstance(heads[0], str) or is_pattern(heads[0]):
        raise UserMisconfigurationError(
            f"Expected `--head` to name the one head of a comparison, but the callback has {heads[0]!r}."
        )
    return heads[0]


def _default_folder(config: Namespace) -> Path:
    files = config.get("config") or []
    name = Path(str(files[0])).stem if files else "fit"
    return Path(config.trainer.default_root_dir or ".") / "comparison" / name
