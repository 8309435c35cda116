"""Whole comparisons of tiny fits."""

import itertools
import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from fits import HEAD, SomebodysModule, make_data, make_loader
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from glai_lightning import GLAIHead, SupervisedModule, mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback
from glai_lightning.comparison import compare, markdown_report, text_report
from glai_lightning.comparison.plots import write_plots
from glai_lightning.datamodules import FeaturesDataModule
from glai_lightning.solvers import LogisticSolver

RUN_KEYS = {
    *("variant", "seed", "epochs", "finished_seconds", "finished_cpu_seconds", "best_val_score", "test_score"),
    *("parameters", "step_cpu_seconds", "peak_memory_bytes"),
}
EPOCH_KEYS = {"epoch", "seconds", "cpu_seconds", "train_loss", "val_score", "churn", "frozen"}
SETTLED = {"churn_tolerance": 1.0, "relative_tolerance": 1.0, "min_steps": 0}


def make_features(seed, samples=240, regression=False):
    inputs, targets = make_data(samples)
    if regression:
        targets = inputs @ torch.arange(8.0) + torch.relu(inputs[:, 0])
    train, test = slice(0, samples // 2), slice(samples // 2, None)
    arrays = {"x_train": inputs[train], "y_train": targets[train], "x_test": inputs[test], "y_test": targets[test]}
    return FeaturesDataModule(arrays=arrays, batch_size=32, seed=seed)


class Made:
    """Makes tiny fits, and keeps the parts of each."""

    def __init__(self, *callbacks, module=None, data=make_features, max_epochs=3, freeze=SETTLED, **options):
        self.parts = []
        self.callbacks, self.data, self.max_epochs, self.freeze, self.options = (
            callbacks,
            data,
            max_epochs,
            freeze,
            options,
        )
        self.module = module or (lambda: SupervisedModule(mlp_head(8, 16, 3)))

    def __call__(self, seed):
        callbacks = [make() for make in self.callbacks]
        if self.freeze is not None:
            callbacks.append(StructureFreezeCallback(**self.freeze))
        defaults = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "max_epochs": self.max_epochs}
        trainer = Trainer(callbacks=callbacks, **{**defaults, **self.options})
        parts = self.module(), self.data(seed), trainer
        self.parts.append(parts)
        return parts


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Drawing takes longer than the tiny fits do."""
    monkeypatch.setattr("glai_lightning.comparison.protocol.write_plots", lambda comparison, folder: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a comparison with two seeds, and the folder that it wrote, plots and all."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glai_lightning.comparison.protocol.write_plots", write_plots)
        return run(folder, seeds=2), folder / "comparison"


def run(tmp_path, make=None, **changes):
    options = {"score": "val/accuracy", "mode": "max", "variants": "mlp,output+solve", "seeds": 1, "progress": False}
    return compare(make or Made(), to=tmp_path / "comparison", **{**options, **changes})


def test_every_variant_is_run_with_every_seed_in_turn(tmp_path):
    variants = "mlp,annealed,output,output+solve,tangent,independent,independent+solve,random+solve,linear+solve"
    comparison = run(tmp_path, Made(max_epochs=2), variants=variants, seeds=2)
    lines = (tmp_path / "comparison" / "runs.jsonl").read_text().splitlines()[1:]
    order = [(run["seed"], run["variant"]) for run in map(json.loads, lines)]
    assert [seed for seed, _ in order] == [0] * 9 + [1] * 9
    assert {variant for _, variant in order[:9]} == {variant for _, variant in order[9:]} == set(variants.split(","))
    assert order[8][1] == order[17][1] == "annealed"
    frozen = {run.variant: run.frozen for run in comparison.runs}
    assert frozen == {variant: variant not in ("mlp", "annealed") for variant in variants.split(",")}
    epochs = {run.variant: len(run.epochs) for run in comparison.of("mlp") + comparison.of("output+solve")}
    assert epochs == {"mlp": 2, "output+solve": 1}


def test_heads_are_run_on_both_sides_and_compared_with_themselves(tmp_path):
    comparison = run(tmp_path, Made(max_epochs=2), variants=None, heads="glu,linear", seeds=2)
    assert list(comparison.summary) == ["mlp", "output+solve", "glu", "glu+solve", "linear", "linear+solve"]
    read = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["heads"]
    assert list(read) == ["mlp", "glu", "linear"]
    mlp, solved = comparison.of("linear"), comparison.of("linear+solve")
    differences = [other.test_score - one.test_score for one, other in zip(mlp, solved, strict=True)]
    assert read["linear"]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    sizes = {run.variant: run.head_parameters for run in comparison.runs}
    assert (read["mlp"]["parameters"], read["glu"]["parameters"]) == (sizes["output+solve"], sizes["glu+solve"])
    table = text_report(comparison).split("\n\n")[-2].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        [head, f"{side['parameters']:,}"] for head, side in read.items()
    ]
    # Nothing before the last layer of the linear head is trained, on neither side.
    assert {run.parameters.trainable for run in (*mlp, *solved)} == {sizes["linear"]}


def test_files_hold_what_the_protocol_asks_for(finished):
    comparison, folder = finished
    read = json.loads((folder / "comparison.json").read_text())
    assert {"config", "machine", "runs", "summary"} <= read.keys()
    assert len(read["runs"]) == 4
    for one in read["runs"]:
        assert one.keys() >= RUN_KEYS
        assert one["parameters"].keys() == {"total", "trainable", "optimizer_state_bytes"}
        assert all(epoch.keys() >= EPOCH_KEYS for epoch in one["epochs"])
    summary = read["summary"]["output+solve"]
    assert summary["speedup_finished"].keys() == summary["speedup_best"].keys() == {"mean", "low", "high", "p"}
    assert summary["test_difference"].keys() == {"mean", "low", "high"}
    assert comparison.verdict.sentence in (folder / "comparison.md").read_text()
    for plot in ("score_over_seconds", "finished_head", "churn"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{plot}.png" in (folder / "comparison.md").read_text()


def test_a_run_tells_what_its_fit_was_like(tmp_path):
    comparison = run(tmp_path, variants="mlp,output")
    mlp, output = comparison.runs
    seconds = [epoch.cpu_seconds for epoch in output.epochs]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < output.finished_cpu_seconds
    assert 0 < output.training_cpu_seconds < output.finished_cpu_seconds
    assert [epoch.frozen for epoch in output.epochs] == [False, True, True]
    assert output.epochs[0].churn > 0
    assert [epoch.churn for epoch in mlp.epochs] == [None] * 3
    assert mlp.epochs[0].train_loss > mlp.epochs[2].train_loss > 0
    assert (mlp.parameters.total, mlp.parameters.trainable) == (8 * 16 + 16 + 16 * 3 + 3,) * 2
    assert (output.parameters.total, output.parameters.trainable) == (mlp.parameters.total, 16 * 3 + 3)
    assert mlp.parameters.optimizer_state_bytes > 8 * mlp.parameters.total
    assert (mlp.evaluations, mlp.freeze_epoch, output.freeze_epoch) == (3, None, 1)
    assert mlp.best_val_score == max(epoch.val_score for epoch in mlp.epochs)
    assert mlp.best_cpu_seconds == mlp.epochs[mlp.best_epoch].cpu_seconds


def test_the_looks_of_the_solver_at_validation_data_are_counted(tmp_path):
    solver = LogisticSolver(max_passes=4)
    assert 3 <= run(tmp_path, solver=solver).of("output+solve")[0].evaluations <= 6


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_annealed_mlp_is_given_the_time_of_the_solved_fit_under_one_cycle(tmp_path):
    make = Made(Rates, max_epochs=4, freeze={"freeze_at_epoch": 2})
    comparison = run(tmp_path, make, variants="mlp,output+solve,annealed", patience=1)
    mlp, solved, annealed = comparison.runs
    of_an_epoch = mlp.finished_cpu_seconds / mlp.num_epochs
    assert annealed.num_epochs == max(1, round(solved.finished_cpu_seconds / of_an_epoch))
    rates = make.parts[-1][2].callbacks[1].rates
    assert len(rates) == 3 * annealed.num_epochs
    assert rates[0] < rates[1]
    assert max(rates) > 0.001 > 10 * rates[-1]


def test_the_time_until_the_mlp_was_as_good_is_told(tmp_path):
    class Scored(scored([0.1, 0.9, 0.95])):
        def on_validation_epoch_end(self):
            self.log("val/given", 0.9 if isinstance(self.head, GLAIHead) else next(self.scores))

    comparison = run(tmp_path, Made(module=Scored), score="val/given", variants="mlp,output", seeds=2)
    summary = comparison.summary["output"]
    seconds = [run.epochs[1].cpu_seconds for run in comparison.of("mlp")]
    assert (summary.mlp_reached_runs, summary.mlp_reached_seconds) == (2, pytest.approx(sum(seconds) / 2))
    assert comparison.summary["mlp"].mlp_reached_runs == 2


def test_fits_compute_on_the_threads_that_are_named(tmp_path):
    used = []

    class Threads(Callback):
        def on_train_start(self, *_):
            used.append(torch.get_num_threads())

    torch.set_num_threads(2)
    comparison = run(tmp_path, Made(Threads), variants="mlp,output")
    assert set(used) == {1}
    assert comparison.machine["threads"] == 1
    assert torch.get_num_threads() == 2


def test_both_sides_are_the_same_fit_until_the_freeze(tmp_path):
    comparison = run(tmp_path, Made(freeze={"freeze_at_epoch": 2}), variants="mlp,output,tangent")
    for variant in ("output", "tangent"):
        pairs = zip(comparison.of("mlp")[0].epochs[:2], comparison.of(variant)[0].epochs[:2], strict=True)
        assert all((a.train_loss, a.val_score) == (b.train_loss, b.val_score) for a, b in pairs)


def test_seeds_differ_in_weights_and_data(finished):
    one, other = finished[0].of("mlp")
    assert one.epochs[0].train_loss != other.epochs[0].train_loss


def test_the_same_seed_gives_the_same_scores_whatever_is_run_with_it(tmp_path, finished):
    first = [run for run in finished[0].runs if run.seed == 1]
    second = run(tmp_path, first_seed=1).runs
    assert [run.best_val_score for run in first] == [run.best_val_score for run in second]
    assert [run.test_score for run in first] == [run.test_score for run in second]


def scored(validation, tested=None):
    """Return a module whose validation scores are given, and which remembers which weights were tested."""

    class Scored(SupervisedModule):
        def __init__(self):
            super().__init__(mlp_head(8, 16, 3))
            self.scores, self.tested = iter(itertools.chain(validation, itertools.repeat(0.0))), tested
            self.marks = []

        def on_validation_epoch_end(self):
            self.marks.append(float(self.head[0].weight.sum()))
            self.log("val/given", next(self.scores))

        def test_step(self, batch, batch_idx):
            self.log("test/given", float(self.head[0].weight.sum()))

    return Scored


def test_early_stopping_ends_every_side_and_the_best_epoch_is_tested(tmp_path):
    make = Made(module=scored([0.1, 0.9, 0.3, 0.2, 0.5, 0.6]), max_epochs=20, freeze={"freeze_at_epoch": 4})
    comparison = run(tmp_path, make, score="val/given", variants="mlp,output")
    modules = [module for module, _, _ in make.parts[-2:]]
    for one, module in zip(comparison.runs, modules, strict=True):
        assert len(one.epochs) == 5
        assert (one.best_epoch, one.best_val_score) == (1, pytest.approx(0.9))
        assert one.test_score == pytest.approx(module.marks[1])
        assert module.marks[1] != module.marks[-1]
    # The best weights are of the MLP, and were tested in the frozen head.
    assert isinstance(modules[1].head, GLAIHead)


def test_without_patience_a_fit_runs_to_its_end(tmp_path):
    make = Made(module=scored([0.9]), max_epochs=8)
    assert len(run(tmp_path, make, score="val/given", variants="mlp,output", patience=None).runs[0].epochs) == 8


def test_the_freeze_rule_goes_by_the_score_where_nothing_else_monitors_it(tmp_path):
    # The training loss falls to the end: by that, a side that solves nothing would never freeze.
    settled = {**SETTLED, "min_steps": 1}
    make = Made(module=scored([0.9] + [0.5] * 9), max_epochs=8, freeze=settled)
    comparison = run(tmp_path, make, score="val/given", variants="mlp,output", patience=None)
    assert comparison.of("output")[0].freeze_epoch is not None


def test_the_smallest_score_is_the_best_where_the_mode_says_so(tmp_path):
    make = Made(module=scored([3.0, 1.0, 2.0]))
    comparison = run(tmp_path, make, score="val/given", mode="min", variants="mlp,output")
    assert comparison.runs[0].best_val_score == 1.0


def regressor():
    return SupervisedModule(mlp_head(8, 16, 1), task="regression")


def test_a_regression_is_solved_by_ridge_and_a_smaller_error_counts_as_better(tmp_path):
    make = Made(module=regressor, data=lambda seed: make_features(seed, regression=True))
    comparison = run(tmp_path, make, score="val/mse", mode="min", seeds=2)
    mlp, solved = comparison.of("mlp"), comparison.of("output+solve")
    assert all(b.test_score < a.test_score / 2 for a, b in zip(mlp, solved, strict=True))
    assert comparison.summary["output+solve"].test_difference.low > 0


class SomebodysData(LightningDataModule):
    def train_dataloader(self):
        return make_loader()

    def val_dataloader(self):
        return make_loader(64)


def test_somebodys_own_module_is_compared_without_test_data(tmp_path):
    make = Made(module=SomebodysModule, data=lambda seed: SomebodysData(), freeze=None)
    variants = "mlp,output+solve,independent,random+solve"
    comparison = run(tmp_path, make, score="val_loss", mode="min", head=HEAD, variants=variants, seeds=2)
    assert all(run.test_score is None for run in comparison.runs)
    assert comparison.summary["random+solve"].test_difference is None
    assert "val_loss (there is no test data)" in comparison.verdict.sentence
    assert "test (no data)" in text_report(comparison)


def test_a_test_score_may_have_the_name_of_the_validation_score(tmp_path):
    class Data(SomebodysData):
        def test_dataloader(self):
            return make_loader(64)

    make = Made(module=SomebodysModule, data=lambda seed: Data())
    comparison = run(tmp_path, make, score="val_loss", mode="min", head=HEAD, variants="mlp,output")
    assert comparison.test_score == "val_loss"
    assert comparison.runs[0].test_score > 0


def test_a_head_that_never_settles_is_said_to_have_stayed_an_mlp(tmp_path):
    comparison = run(tmp_path, Made(freeze={"churn_tolerance": 0.0}), seeds=2)
    assert not any(run.frozen for run in comparison.runs)
    assert "stayed an MLP in 2 of 2 runs" in comparison.verdict.sentence
    assert "stayed an MLP in 2 of 2" in markdown_report(comparison)
    assert comparison.of("output+solve")[0].test_score == comparison.of("mlp")[0].test_score


class Counts(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_):
        self.batches += 1


def test_other_callbacks_are_kept_and_what_writes_or_draws_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [Counts, LearningRateMonitor, ModelCheckpoint, FitReport, lambda: EarlyStopping("nothing")]
    make = Made(*callbacks, logger=CSVLogger(tmp_path / "logs"), enable_progress_bar=True)
    run(tmp_path, make)
    trainers = [trainer for _, _, trainer in make.parts[-2:]]
    assert all(trainer.callbacks[1].batches > 0 for trainer in trainers)
    names = [type(callback).__name__ for callback in trainers[1].callbacks]
    assert names == ["Recorder", "Counts", "LearningRateMonitor", "StructureFreezeCallback", "EarlyStopping"]
    assert {path.name for path in tmp_path.iterdir()} == {"comparison"}


class CutShortError(Exception):
    pass


def test_an_interrupted_comparison_goes_on_without_repeating_finished_runs(tmp_path):
    class Stops(Made):
        def __call__(self, seed):
            # After two dry runs and three runs.
            if len(self.parts) == 5:
                raise CutShortError
            return super().__call__(seed)

    with pytest.raises(CutShortError):
        run(tmp_path, Stops(), seeds=2)
    kept = (tmp_path / "comparison" / "runs.jsonl").read_text()
    assert kept.count("\n") == 4
    resumed = Made()
    comparison = run(tmp_path, resumed, seeds=2)
    assert (tmp_path / "comparison" / "runs.jsonl").read_text().startswith(kept)
    assert len(comparison.runs) == 4
    # The dry run of the MLP, and the one run that was missing, which is one of it.
    assert len(resumed.parts) == 2


def test_more_seeds_add_to_the_finished_runs(tmp_path):
    first = run(tmp_path, seeds=1)
    second = run(tmp_path, seeds=2, variants="mlp,output,output+solve")
    assert len(second.runs) == 6
    assert all(one in second.runs for one in first.runs)


def test_runs_under_other_rules_are_not_mixed_in(tmp_path, finished):
    shutil.copytree(finished[1], tmp_path / "comparison")
    with pytest.raises(MisconfigurationException, match=r"differs in `config.comparison.patience`"):
        run(tmp_path, patience=5)
    with pytest.raises(MisconfigurationException, match=r"differs in `config.fit.batch_size`"):
        run(tmp_path, config={"batch_size": 32})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": 0}, "Expected `seeds` to be an integer of at least 1, but got 0"),
        ({"mode": "most"}, "Expected `mode` to be 'min' or 'max', but got 'most'"),
        ({"patience": 0}, "Expected `patience` to be an integer of at least 1, but got 0"),
        ({"score": "val/beauty"}, r"Expected the validation score 'val/beauty' to be logged .* 'val/accuracy'"),
        ({"test_score": "test/beauty"}, r"Expected the test score 'test/beauty' to be logged .* 'test/accuracy'"),
        (
            {"head": "heart"},
            r"Expected `head` to name a module .* but got 'heart'. Modules that can be used as a head: .'head'",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_measured(tmp_path, changes, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        run(tmp_path, **changes)
    runs = tmp_path / "comparison" / "runs.jsonl"
    assert not runs.exists() or runs.read_text().count("\n") == 1


def test_a_loss_that_cannot_be_solved_is_found_out_in_the_dry_run(tmp_path):
    class Unusual(SupervisedModule):
        def loss(self, predictions, targets):
            return F.multi_margin_loss(predictions, targets)

    make = Made(module=lambda: Unusual(mlp_head(8, 16, 3)))
    with pytest.raises(MisconfigurationException, match="Expected a loss that can be differentiated"):
        run(tmp_path, make)
    assert run(tmp_path / "unsolved", make, variants="mlp,output").runs


def test_several_callbacks_that_freeze_leave_no_rule(tmp_path):
    make = Made(lambda: StructureFreezeCallback("another_head", solver=None, min_steps=0))
    with pytest.raises(MisconfigurationException, match="Expected one `StructureFreezeCallback` at most"):
        run(tmp_path, make)


@pytest.mark.parametrize("library", ["matplotlib", "scipy"])
def test_a_library_that_is_not_installed_is_named_before_anything_is_measured(tmp_path, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"Expected `{library}` to be installed .*glai-lightning\[compare\]"):
        run(tmp_path)
    assert not (tmp_path / "comparison").exists()


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="Expected a comparison to run in one process, but got 2"):
        run(tmp_path, Made(devices=2))
