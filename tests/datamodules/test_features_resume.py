"""A fit cut anywhere and resumed reads the batches that the uninterrupted fit reads."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from recording import Recorder, numbered_rows, quiet_trainer

EPOCHS, BATCHES = 3, 5

TRAINERS = {
    "plain": {},
    "max_steps": {"max_epochs": -1, "max_steps": EPOCHS * BATCHES},
    "no_validation": {"limit_val_batches": 0},
    "validation_inside_epochs": {"val_check_interval": 2},
    "accumulated_gradients": {"accumulate_grad_batches": 2},
    "limit_train_batches": {"limit_train_batches": 3},
    "fresh_loaders_each_epoch": {"reload_dataloaders_every_n_epochs": 1},
}


class SaveIn(pl.Callback):
    """Saves a checkpoint whenever a hook is called, named after the number of batches read so far."""

    def __init__(self, hook, folder):
        setattr(self, hook, self.save)
        self.folder = folder

    def save(self, trainer, pl_module, *args):
        trainer.save_checkpoint(self.folder / f"{len(pl_module.read['train'])}.ckpt")


def fit(ckpt_path=None, callbacks=(), module=None, batch_size=4, **options):
    module = Recorder() if module is None else module
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": EPOCHS, "enable_checkpointing": checkpointing} | options
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=numbered_rows(batch_size=batch_size), ckpt_path=ckpt_path)
    return module.read["train"]


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_checkpoints_of_any_moment_resume_with_the_batches_to_come(tmp_path, hook, options):
    uninterrupted = fit(callbacks=[SaveIn(hook, tmp_path)], **options)
    checkpoints = {int(path.stem): path for path in tmp_path.iterdir()}
    assert len(checkpoints) >= EPOCHS or options.get("limit_val_batches") == 0
    for batches_read, path in checkpoints.items():
        assert fit(path, **options) == uninterrupted[batches_read:], batches_read


def test_a_fit_that_fails_resumes_from_its_last_model_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    module = Recorder(fail_in_hook="training_step", fail_at_step=8)
    with pytest.raises(RuntimeError, match="cut"):
        fit(callbacks=[checkpoint], module=module)
    assert module.read["train"] + fit(tmp_path / "last.ckpt") == fit()


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 2),
        ("on_train_batch_start", 5),
        ("training_step", 4),
        ("training_step", 7),
        ("on_train_batch_end", 5),
        ("on_train_batch_end", 7),
        ("validation_step", 5),
        ("on_validation_end", 10),
        ("on_train_epoch_end", 5),
    ],
)
def test_a_checkpoint_of_the_exception_itself_loses_no_batch_and_repeats_none(tmp_path, hook, step):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    module = Recorder(fail_in_hook=hook, fail_at_step=step)
    with pytest.raises(RuntimeError, match="cut"):
        fit(callbacks=[checkpoint], module=module)
    assert module.read["train"] + fit(tmp_path / "last.ckpt") == fit()


def test_reading_the_loader_besides_the_fit_does_not_move_its_position(tmp_path):
    class ReadAll(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert len(list(trainer.train_dataloader)) == BATCHES

        def on_train_batch_end(self, trainer, *args):
            assert len(list(trainer.train_dataloader)) == BATCHES

    uninterrupted = fit(callbacks=[ReadAll(), SaveIn("on_train_batch_end", tmp_path)])
    assert uninterrupted == fit()
    assert fit(tmp_path / "7.ckpt") == uninterrupted[7:]


def test_a_position_in_an_epoch_is_refused_where_its_batches_have_changed(tmp_path):
    fit(callbacks=[SaveIn("on_train_batch_end", tmp_path)])
    with pytest.raises(ValueError, match=r"Expected 19 rows in 5 batches, .* but got 19 rows in 7 batches"):
        fit(tmp_path / "7.ckpt", batch_size=3)


def test_another_batch_size_takes_over_at_the_end_of_an_epoch(tmp_path):
    fit(callbacks=[SaveIn("on_train_epoch_end", tmp_path)])
    assert fit(tmp_path / "5.ckpt", batch_size=3) == fit(batch_size=3)[7:]
