import pytest
import torch
from fits import FEATURES, HEAD, SomebodysModule, make_loader, make_trainer, save_unfitted
from lightning.pytorch import LightningModule
from torch import nn

from glai_lightning import GLAIHead, load_frozen, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback


class ApartModule(SomebodysModule):
    """The layers of the head lie at two names."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class PartlySaved(SomebodysModule):
    """Saves a part of its state dict, as projects with a large backbone do, and with it no metadata."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("body")}


class HasObjects(SomebodysModule):
    """Keeps an object of its own among the hyper-parameters."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["hyper_parameters"] = {"cls": ApartModule}


def fit_and_save(module, head, paths, path):
    callback = StructureFreezeCallback(head, paths, freeze_at_epoch=1, solver=None, verbose=False)
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, make_loader(64))
    trainer.save_checkpoint(path)
    return module.eval()


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
@pytest.mark.parametrize("kind", [SomebodysModule, PartlySaved])
def test_a_module_made_anew_computes_what_the_fitted_one_does(kind, paths, tmp_path):
    fitted = fit_and_save(kind(), HEAD, paths, tmp_path / "last.ckpt")
    fresh = load_frozen(kind(), tmp_path / "last.ckpt").eval()
    fresh.body.load_state_dict(fitted.body.state_dict())
    x = torch.randn(9, FEATURES)
    assert torch.equal(fresh(x), fitted(x))
    head = fresh.get_submodule(HEAD)
    assert head.paths == paths
    assert (head.freeze_epoch == 1) is (kind is SomebodysModule or paths == "output")
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in fitted.parameters()]


def test_a_head_whose_layers_lie_apart_is_found_and_goes_on_in_a_fit(tmp_path):
    fitted = fit_and_save(ApartModule(), "first+last", "output", tmp_path / "last.ckpt")
    fresh = load_frozen(ApartModule(), tmp_path / "last.ckpt")
    assert not fresh.first.weight.requires_grad
    callback = StructureFreezeCallback("first+last", solver=None, verbose=False)
    make_trainer(callback, max_epochs=1).fit(fresh, make_loader(64))
    assert callback.frozen
    assert torch.equal(fresh.first.weight, fitted.first.weight)


def test_a_checkpoint_without_a_frozen_head_is_loaded_as_it_is(tmp_path):
    module = SomebodysModule()
    save_unfitted(module, tmp_path / "mlp.ckpt")
    fresh = load_frozen(SomebodysModule(), tmp_path / "mlp.ckpt")
    assert not isinstance(fresh.get_submodule(HEAD), GLAIHead)
    assert torch.equal(fresh.body.weight, module.body.weight)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SomebodysModule(mlp_head(FEATURES, 5, 3)), "instead of a tensor of shape"),
        (SomebodysModule(nn.Linear(FEATURES, 3)), "Expected"),
        (LightningModule(), f"Expected a module with the head '{HEAD}' that is frozen in the checkpoint"),
        ("module", "Expected `module` to be a module, but got 'module'"),
    ],
)
def test_another_module_is_answered_with_a_sentence_and_stays_as_it_was(module, message, tmp_path):
    fit_and_save(SomebodysModule(), HEAD, "tangent", tmp_path / "last.ckpt")
    before = {} if module == "module" else {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message) as raised:
        load_frozen(module, tmp_path / "last.ckpt")
    assert type(raised.value).__module__.startswith("glai_lightning")
    for key, value in before.items():
        assert torch.equal(module.state_dict()[key], value)


def test_a_file_that_is_none_is_answered_with_a_sentence(tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="there is no file"):
        load_frozen(SomebodysModule(), tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="to be a checkpoint, but it is none"):
        load_frozen(SomebodysModule(), tmp_path / "text.ckpt")


def test_objects_are_read_only_where_that_is_asked_for(tmp_path):
    fitted = fit_and_save(HasObjects(), HEAD, "tangent", tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of tensors and primitives"):
        load_frozen(HasObjects(), tmp_path / "last.ckpt")
    fresh = load_frozen(HasObjects(), tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(fresh.body.weight, fitted.body.weight)
