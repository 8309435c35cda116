"""Projects that build their own Trainer, reached by `GLAI_FREEZE`: Lightning finds the entry points by itself."""

import importlib

import pytest
from fits import HEAD, SomebodysModule, make_loader
from lightning.pytorch import Callback

from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.comparison.protocol import Rules
from glai_lightning.comparison.variants import find_variant, prepare_fit

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_trainer(namespace="lightning.pytorch", callbacks=None):
    """Build a Trainer as a project does that knows nothing of this package."""
    return importlib.import_module(namespace).Trainer(max_epochs=1, callbacks=callbacks, **QUIET)


def make_module(namespace="lightning.pytorch"):
    """Make a module of either namespace, which know nothing of one another."""
    module, base = SomebodysModule(), importlib.import_module(namespace).LightningModule
    if isinstance(module, base):
        return module
    methods = {name: vars(SomebodysModule)[name] for name in ("forward", "training_step", "configure_optimizers")}
    twin = type("Twin", (base,), methods)()
    twin.body, twin.blocks = module.body, module.blocks
    return twin


def freezing(trainer):
    return [callback for callback in trainer.callbacks if "Freeze" in type(callback).__name__]


def fit(trainer, module=None):
    trainer.fit(module or SomebodysModule(), make_loader(64))
    return [callback for callback in trainer.callbacks if isinstance(callback, StructureFreezeCallback)]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(("value", "head"), [(HEAD, HEAD), ("blocks.*", "blocks.*"), (f"{HEAD}, ", None)])
def test_a_trainer_freezes_the_heads_that_the_variable_names(namespace, value, head, monkeypatch):
    monkeypatch.setenv("GLAI_FREEZE", value)
    if head is None:
        with pytest.raises(Exception, match=r"Expected `GLAI_FREEZE` to name heads, split by commas"):
            make_trainer(namespace)
        return
    (callback,) = fit(make_trainer(namespace), make_module(namespace))
    assert callback.head == head
    assert list(callback.heads) == [HEAD]
    assert len(callback.churn_history) == 1


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_happens_where_it_is_unset(value, monkeypatch):
    monkeypatch.delenv("GLAI_FREEZE", raising=False)
    if value is not None:
        monkeypatch.setenv("GLAI_FREEZE", value)
    assert freezing(make_trainer()) == []


def test_a_wrong_name_is_answered_with_the_names_that_can_be_used(monkeypatch):
    monkeypatch.setenv("GLAI_FREEZE", "tail")
    with pytest.raises(Exception, match=rf"Expected `head` to name a module.*got 'tail'.*'{HEAD}'"):
        fit(make_trainer())


def test_a_list_of_callbacks_may_go_from_trainer_to_trainer(monkeypatch):
    # Lightning adds to the list of the program itself, so that the second Trainer is given what the first was.
    monkeypatch.setenv("GLAI_FREEZE", HEAD)
    callbacks = [Callback()]
    for _ in range(2):
        trainer = make_trainer(callbacks=callbacks)
        assert freezing(trainer) != fit(trainer) == freezing(trainer)
    assert len(callbacks) == 3


def test_the_callback_of_the_program_goes_first(monkeypatch):
    monkeypatch.setenv("GLAI_FREEZE", "tail")
    own = StructureFreezeCallback(HEAD, verbose=False)
    assert fit(make_trainer(callbacks=[own])) == [own]


def test_a_comparison_leaves_its_mlp_alone(monkeypatch):
    monkeypatch.setenv("GLAI_FREEZE", HEAD)
    rules = Rules("val_loss", "min", HEAD, None)
    prepared = prepare_fit((SomebodysModule(), None, make_trainer()), find_variant("mlp"), rules, None)
    assert freezing(prepared.trainer) == []
