import csv
import dataclasses
import io
import sys

import matplotlib.image
import pytest
import torch
from fits import HEAD, SomebodysModule, make_loader, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glai_lightning import freeze_structure
from glai_lightning.callbacks import FitReport, StructureFreezeCallback
from glai_lightning.callbacks.fit_plots import as_image, churn_figure, save_png, score_figure
from glai_lightning.callbacks.fit_table import fit_table
from glai_lightning.fitting.fit_record import EpochRecord, FitRecord, SolveRecord, seconds_per_step


def epoch(number, score, churn=None, *, seconds=1.0, frozen=False, **changes):
    sizes = (100, 800) if frozen else (500, 4000)
    fields = {
        "seconds": 10.0 * (number + 1),
        "val_score": score,
        "churn": churn,
        "frozen": frozen,
        "trained_frozen": frozen,
        "steps": 10,
        "training_seconds": seconds,
        "trainable_parameters": sizes[0],
        "optimizer_state_bytes": sizes[1],
    }
    return EpochRecord(number, **{**fields, **changes})


def make_record(**changes):
    epochs = [
        epoch(0, 0.80, 0.20, seconds=2.0),
        epoch(1, 0.85, 0.04, seconds=3.0),
        epoch(2, 0.95, frozen=True),
        epoch(3, 0.90, seconds=1.5, frozen=True),
    ]
    fields = {
        "epochs": epochs,
        "frozen": True,
        "freeze_epoch": 2,
        "freeze_step": 20,
        "freeze_reason": "churn 4.00% is small",
        "churn_tolerance": 0.1,
        "relative_tolerance": 0.25,
        "score_name": "val/accuracy",
        "finished_seconds": 42.0,
    }
    return FitRecord(**{**fields, **changes})


def solved(**changes):
    """Return the record of a fit whose head was frozen and solved at the end of its second epoch, where it stopped."""
    last = epoch(1, 0.97, 0.04, frozen=True, trained_frozen=False, optimizer_state_bytes=0)
    solve = SolveRecord(0.5, 0.25, passes=6, evaluations=5, start_score=0.91, score=0.97)
    return make_record(**{"epochs": [epoch(0, 0.8, 0.2), last], "solve": solve, "max_epochs": 40, **changes})


def unwrapped(table):
    return " ".join(table.split())


def cells(table, name):
    (line,) = [line for line in table.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


def test_the_table_compares_before_and_after():
    table = fit_table(make_record())
    assert "frozen after 2 epochs (step 20): churn 4.00% is small" in unwrapped(table)
    assert cells(table, "epochs") == ["2", "2"]
    assert cells(table, "trainable parameters") == ["500", "100", "5.00"]
    assert cells(table, "optimizer state [bytes]") == ["4,000", "800", "5.00"]
    assert cells(table, "seconds per step (median)") == ["0.250000", "0.125000"]
    assert cells(table, "training [s]") == ["5.00", "2.50"]
    assert cells(table, "whole fit [s]")[0] == "42.00,"


def test_the_table_names_best_and_last_score():
    assert "best 0.9500 (epoch 2, frozen) last 0.9000 (epoch 3, frozen)" in unwrapped(fit_table(make_record()))


def test_the_best_score_is_the_smallest_where_the_mode_says_so():
    assert "best 0.8000 (epoch 0, not frozen)" in fit_table(make_record(mode="min"))


def test_the_table_holds_test_scores_and_what_was_tested():
    table = fit_table(make_record(tested="best.ckpt", test_scores={"test/accuracy": 0.9125}))
    assert cells(table, "test/accuracy") == ["0.9125", "(best.ckpt)"]


def test_the_table_of_a_fit_that_never_froze_leaves_the_side_after_open():
    record = make_record(epochs=make_record().epochs[:2], frozen=False, freeze_epoch=None, freeze_reason=None)
    table = fit_table(record)
    assert "did not settle in 2 epochs (churn 4.00% at the last check, 20.00% at most)" in unwrapped(table)
    assert "Nothing was frozen" in table
    assert cells(table, "trainable parameters") == ["500", "-"]


def test_the_table_of_a_fit_frozen_from_the_start_knows_the_parameters_of_the_mlp():
    record = make_record(epochs=make_record().epochs[2:], freeze_epoch=0, freeze_step=0, mlp_parameters=500)
    table = fit_table(record)
    assert "frozen before the first step" in table
    assert cells(table, "trainable parameters") == ["500", "100", "5.00"]
    assert cells(table, "optimizer state [bytes]") == ["-", "800"]


def test_the_table_says_that_there_was_no_validation():
    unscored = [epoch(0, None, 0.2)]
    assert "not logged by a validation" in fit_table(make_record(epochs=unscored))
    assert "no score is monitored" in fit_table(make_record(epochs=unscored, score_name=None))


def test_the_table_of_an_empty_fit_can_be_written():
    table = fit_table(make_record(epochs=[], frozen=False, score_name=None))
    assert "did not settle in 0 epochs (churn not measured)" in table


def test_seconds_per_step_are_the_median_of_epochs():
    epochs = [EpochRecord(n, steps=10, training_seconds=seconds) for n, seconds in enumerate((90.0, 1.0, 2.0))]
    assert seconds_per_step(epochs).wall == 0.2
    assert seconds_per_step([]) is None


@pytest.mark.parametrize("draw", [churn_figure, score_figure])
@pytest.mark.parametrize("epochs", [0, 1, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_plots_are_valid_images_of_any_fit(draw, epochs, frozen):
    figure = draw(make_record(epochs=make_record().epochs[:epochs], frozen=frozen))
    file = io.BytesIO()
    save_png(figure, file)
    file.seek(0)
    assert matplotlib.image.imread(file, format="png").shape[:2] == (450, 800)
    assert as_image(figure).shape == (450, 800, 3)


def test_the_churn_plot_marks_thresholds_and_freeze():
    (axes,) = churn_figure(make_record()).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "churn",
        "churn_tolerance = 0.1",
        "relative_tolerance = 0.25, of the largest so far",
        "structure frozen",
    ]
    churn, tolerance, relative, freeze = axes.lines
    assert list(churn.get_xdata()) == [1, 2]
    assert list(churn.get_ydata()) == pytest.approx([20.0, 4.0])
    assert set(tolerance.get_ydata()) == {10.0}
    assert set(relative.get_ydata()) == {5.0}
    assert set(freeze.get_xdata()) == {2}


def test_the_score_plot_runs_over_seconds_and_marks_freeze_and_best():
    (axes,) = score_figure(make_record()).axes
    score, best, freeze = axes.lines
    assert list(score.get_xdata()) == [10.0, 20.0, 30.0, 40.0]
    assert list(best.get_xdata()) == [30.0]
    assert set(freeze.get_xdata()) == {20.0}


def test_the_score_plot_marks_the_solve_after_the_freeze():
    (axes,) = score_figure(solved()).axes
    *_, freeze, solve = axes.lines
    assert set(freeze.get_xdata()) == {11.0}
    assert set(solve.get_xdata()) == {11.75}


def test_the_score_plot_of_two_fits_holds_both_and_shades_no_longer_than_the_frozen_one_took():
    epochs = [epoch(n, 0.7) for n in range(9)]
    (axes,) = score_figure(solved(), never_frozen=make_record(epochs=epochs, frozen=False)).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label for label in labels if "best" not in label] == [
        "never frozen",
        "frozen",
        "structure frozen",
        "solved",
    ]
    assert axes.get_xlim()[1] > max(axes.lines[0].get_xdata()) == epochs[-1].seconds
    (shade,) = axes.patches
    assert shade.get_x() == 11.0
    assert shade.get_x() + shade.get_width() == solved().epochs[-1].seconds


def test_the_churn_plot_ends_where_churn_does():
    epochs = [epoch(0, 0.8, 0.2), epoch(1, 0.85, 0.04), *(epoch(n, 0.9, frozen=True) for n in range(2, 40))]
    (axes,) = churn_figure(make_record(epochs=epochs)).axes
    assert axes.get_xlim()[1] < 4


def test_the_table_counts_solve_and_collecting_and_says_what_they_did():
    table = fit_table(solved())
    assert cells(table, "collecting inputs [s]") == ["-", "0.25"]
    assert cells(table, "solve [s]") == ["-", "0.50"]
    assert cells(table, "epochs") == ["2", "0"]
    assert cells(table, "optimizer state [bytes]") == ["4,000", "0"]
    assert "best 0.9700 (epoch 1, solved)" in table
    assert unwrapped(table).endswith(
        "The solve took 0.75 s, collecting included, and changed the validation score from 0.9100 to 0.9700. "
        "The fit ended after 2 epochs of 40."
    )


def test_the_table_says_what_a_freeze_without_a_solve_did():
    assert (
        "The best val/accuracy was 0.8500 before the freeze and is 0.9500 after it; a step took 0.50 times as long "
        "after it. The fit ended after 4 epochs."
    ) in unwrapped(fit_table(make_record()))


@pytest.mark.parametrize(("scores", "warned"), [((0.8, 0.85), True), ((0.8, 0.95, 0.951), False), ((0.8, 0.7), False)])
def test_a_freeze_while_the_score_still_rose_is_warned_of(scores, warned):
    before = [epoch(n, score, 0.1) for n, score in enumerate(scores)]
    after = epoch(len(scores), 0.9, frozen=True)
    for mode, sign in (("max", 1), ("min", -1)):
        epochs = [dataclasses.replace(row, val_score=sign * row.val_score) for row in [*before, after]]
        assert ("Warning: val/accuracy was still" in fit_table(make_record(epochs=epochs, mode=mode))) is warned


@pytest.mark.parametrize("record", [make_record(), solved(), make_record(epochs=[])])
def test_the_table_fits_80_columns(record):
    reason = "churn 4.00% is at most 10% and at most 0.25 of the largest, 20.00%; " * 3
    record = dataclasses.replace(record, freeze_reason=reason, tested="best.ckpt", test_scores={"test/accuracy": 0.9})
    assert max(map(len, fit_table(record).splitlines())) <= 80


def test_plots_leave_pyplot_alone():
    sys.modules.pop("matplotlib.pyplot", None)
    save_png(churn_figure(make_record()), io.BytesIO())
    assert "matplotlib.pyplot" not in sys.modules


def fit_reported(freeze=None, *callbacks, report=None, module=None, ckpt_path=None, validate=True, **options):
    report = FitReport("val_loss", "min") if report is None else report
    freeze = StructureFreezeCallback(HEAD, verbose=False, freeze_at_epoch=2, solver=None) if freeze is None else freeze
    trainer = make_trainer(report, freeze, *callbacks, **{"max_epochs": 4, **options})
    module = SomebodysModule() if module is None else module
    trainer.fit(module, make_loader(), make_loader(64) if validate else None, ckpt_path=ckpt_path)
    return report, trainer, module


def test_a_fit_is_recorded_epoch_by_epoch():
    report, _, _ = fit_reported()
    assert [epoch.epoch for epoch in report.record.epochs] == [0, 1, 2, 3]
    assert [epoch.trained_frozen for epoch in report.record.epochs] == [False, False, True, True]
    assert [epoch.steps for epoch in report.record.epochs] == [5, 5, 5, 5]
    assert [epoch.churn is None for epoch in report.record.epochs] == [False, False, True, True]
    assert all(epoch.val_score is not None and epoch.seconds > 0 for epoch in report.record.epochs)
    assert report.record.score_name == "val_loss"


def test_parameters_and_optimizer_state_are_those_of_the_fit():
    report, _, module = fit_reported()
    first, last = report.record.epochs[0], report.record.epochs[-1]
    everything = sum(parameter.numel() for parameter in module.parameters())
    inner = sum(parameter.numel() for parameter in module.blocks["head"][0].parameters())
    assert first.trainable_parameters == everything
    assert last.trainable_parameters == everything - inner
    tensors = len(list(module.parameters()))
    # AdamW keeps two numbers for every one it trains, and a count of steps for every tensor, in 4 bytes each.
    assert first.optimizer_state_bytes == 8 * everything + 4 * tensors
    assert last.optimizer_state_bytes == 8 * (everything - inner) + 4 * (tensors - 2)


def test_bytes_of_nested_optimizer_state_are_counted():
    class Lbfgs(SomebodysModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

    report, _, module = fit_reported(module=Lbfgs())
    # At least one pair of differences, each as long as all parameters.
    assert report.record.epochs[0].optimizer_state_bytes > 8 * sum(p.numel() for p in module.parameters())


def test_the_table_is_printed_once_at_the_end(capsys):
    fit_reported()
    output = capsys.readouterr().out
    assert output.count("Fit report") == 1
    assert "frozen after 2 epochs (step 10): asked to freeze at" in output
    assert "no plots were written" in output


@pytest.mark.parametrize("val_check_interval", [1.0, 2])
def test_training_seconds_leave_validation_out(monkeypatch, val_check_interval):
    clock = [0.0]
    monkeypatch.setattr("glai_lightning.fitting.fit_record.time.perf_counter", lambda: clock[0])

    class Clockwork(Callback):
        def on_train_batch_start(self, *arguments):
            clock[0] += 1

        def on_validation_batch_end(self, *arguments):
            clock[0] += 1000

    report, _, _ = fit_reported(None, Clockwork(), val_check_interval=val_check_interval)
    by_epoch = [[row for row in report.record.epochs if row.epoch == number] for number in range(4)]
    assert [sum(row.training_seconds for row in rows) for rows in by_epoch] == [5, 5, 5, 5]
    assert [sum(row.steps for row in rows) for rows in by_epoch] == [5, 5, 5, 5]
    assert report.record.finished_seconds > 4000


def test_the_score_is_the_one_that_the_checkpoint_monitors(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min")
    report, _, _ = fit_reported(None, checkpoint, report=FitReport())
    assert (report.record.score_name, report.record.mode) == ("val_loss", "min")
    assert report.record.best.val_score == pytest.approx(float(checkpoint.best_model_score))


def test_a_fit_without_validation_is_reported(tmp_path, capsys):
    report, _, _ = fit_reported(validate=False, logger=CSVLogger(tmp_path, name="", version=""))
    assert report.record.scored == []
    assert "not logged by a validation" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"structure_churn.png"}


def test_scores_are_those_of_the_epochs_that_were_validated():
    report, _, _ = fit_reported(check_val_every_n_epoch=2)
    assert [epoch.epoch for epoch in report.record.scored] == [1, 3]


def test_a_fit_that_never_freezes_says_so(capsys):
    fit_reported(StructureFreezeCallback(HEAD, verbose=False, min_epochs=100, solver=None, min_steps=0))
    assert "did not settle in 4 epochs" in capsys.readouterr().out


def test_a_fit_frozen_from_its_first_epoch_is_reported(capsys):
    report, _, module = fit_reported(StructureFreezeCallback(HEAD, verbose=False, freeze_at_epoch=0, solver=None))
    assert all(epoch.frozen and epoch.churn is None for epoch in report.record.epochs)
    assert report.record.mlp_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert "frozen before the first step" in capsys.readouterr().out


def test_a_head_that_was_frozen_before_the_fit_has_no_side_before(capsys):
    module = SomebodysModule()
    module.blocks["head"] = freeze_structure(module.blocks["head"])
    fit_reported(module=module)
    table = capsys.readouterr().out
    assert "frozen before this fit" in table
    assert cells(table, "trainable parameters")[0] == "-"


def test_a_dry_run_is_reported(capsys):
    report, _, _ = fit_reported(fast_dev_run=True)
    assert len(report.record.epochs) == 1
    assert "no plots were written" in capsys.readouterr().out


def test_a_fit_of_part_of_an_epoch_is_reported():
    report, _, _ = fit_reported(max_epochs=-1, max_steps=7)
    assert [epoch.steps for epoch in report.record.epochs] == [5, 2]
    assert [epoch.churn is None for epoch in report.record.epochs] == [False, True]
    assert report.record.epochs[1].trainable_parameters > 0


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_fit_reports_all_epochs(tmp_path, cut, on_train_epoch_end):
    checkpoint = ModelCheckpoint(tmp_path, filename="cut", save_on_train_epoch_end=on_train_epoch_end)
    before, _, _ = fit_reported(None, checkpoint, max_epochs=cut)
    after, _, _ = fit_reported(ckpt_path=tmp_path / "cut.ckpt")
    whole = after.record.epochs
    assert [epoch.epoch for epoch in whole] == [0, 1, 2, 3]
    assert [epoch.steps for epoch in whole] == [5, 5, 5, 5]
    assert [epoch.frozen for epoch in whole] == [False, False, True, True]
    assert [epoch.churn is None for epoch in whole] == [False, False, True, True]
    assert all(epoch.val_score is not None for epoch in whole)
    assert whole[: cut - 1] == before.record.epochs[: cut - 1]
    assert [epoch.seconds for epoch in whole] == sorted(epoch.seconds for epoch in whole)
    assert after.record.mlp_parameters == before.record.mlp_parameters


def test_a_checkpoint_with_a_record_loads_with_weights_only(tmp_path):
    fit_reported(None, ModelCheckpoint(tmp_path, filename="cut"))
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"]["FitReport"]
    assert len(state["epochs"]) == 4


def test_a_second_fit_starts_a_record_of_its_own():
    report, _, _ = fit_reported()
    again, _, _ = fit_reported(report=report, max_epochs=3)
    assert [epoch.epoch for epoch in again.record.epochs] == [0, 1, 2]
    assert [epoch.steps for epoch in again.record.epochs] == [5, 5, 5]


def test_a_test_adds_its_scores_and_leaves_the_record_as_it_is(tmp_path):
    report, trainer, module = fit_reported(None, ModelCheckpoint(tmp_path, filename="cut"))
    epochs = report.record.epochs
    assert report.record.test_scores == {}
    trainer.test(module, make_loader(64), ckpt_path=tmp_path / "cut.ckpt", verbose=False)
    assert report.record.epochs == epochs
    assert report.record.tested == "cut.ckpt"
    assert list(report.record.test_scores) == ["val_loss"]


def test_a_test_without_a_fit_prints_nothing(capsys):
    trainer = make_trainer(FitReport(), StructureFreezeCallback(HEAD, solver=None, min_steps=0))
    trainer.test(SomebodysModule(), make_loader(64), verbose=False)
    assert "Fit report" not in capsys.readouterr().out


def test_plots_lie_beside_the_logs_and_in_tensorboard(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="run")]
    fit_reported(logger=loggers)
    for name in ("structure_churn", "score_over_seconds"):
        assert matplotlib.image.imread(tmp_path / "run" / f"{name}.png").shape[:2] == (450, 800)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["images"]) == {"fit_report/structure_churn", "fit_report/score_over_seconds"}
    assert len(events.Scalars("structure/churn")) == 4
    with (tmp_path / "run" / "metrics.csv").open() as file:
        epochs = [row["epoch"] for row in csv.DictReader(file) if row["structure/churn"]]
    assert epochs == ["0", "1", "2", "3"]


def test_a_fit_without_matplotlib_has_its_table_and_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit_reported(logger=CSVLogger(tmp_path, name="", version=""))
    table = unwrapped(capsys.readouterr().out)
    assert "frozen after 2 epochs" in table
    assert "pip install 'glai-lightning[report]'" in table


@pytest.mark.processes
def test_a_fit_in_two_processes_is_reported_once(tmp_path, capfd):
    fit_reported(strategy="ddp_fork", devices=2, logger=CSVLogger(tmp_path, name="", version=""))
    assert capfd.readouterr().out.count("Fit report") == 1
    assert (tmp_path / "structure_churn.png").exists()


@pytest.mark.parametrize("freezes", [0, 2])
def test_one_freeze_is_needed_to_report_on(freezes):
    callbacks = [StructureFreezeCallback(head, solver=None, min_steps=0) for head in ("blocks.head", "body")[:freezes]]
    with pytest.raises(MisconfigurationException, match=f"one `StructureFreezeCallback` .* but got {freezes}"):
        make_trainer(FitReport(), *callbacks).fit(SomebodysModule(), make_loader())


def test_an_unknown_mode_is_refused():
    with pytest.raises(MisconfigurationException, match="Expected `mode` to be 'min' or 'max', but got 'best'"):
        FitReport(mode="best")
