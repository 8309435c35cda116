"""A fit that freezes in its middle, beside everything that people put into a fit."""

import pytest
import torch
from fits import HEAD, SomebodysModule, make_loader, make_trainer
from lightning.pytorch import Callback

from glai_lightning.callbacks import StructureFreezeCallback

PATHS = ("output", "tangent", "independent")
FREEZE, EPOCHS, BATCHES = 2, 4, 5

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3),
    "fused Adam": lambda p: torch.optim.Adam(p, 3e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "LBFGS with line search": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=3, line_search_fn="strong_wolfe"),
}


class AtFreeze(Callback):
    """Keeps what the frozen parameters were when the head was frozen, and the loss of every epoch."""

    def __init__(self):
        self.frozen, self.losses = {}, []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == FREEZE:
            head = pl_module.blocks["head"]
            self.frozen = {p: p.detach().clone() for p in head.parameters() if not p.requires_grad}

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["loss"]))


def module_with(make_optimizer, **config):
    class Module(SomebodysModule):
        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            return {"optimizer": optimizer, **{key: make(optimizer) for key, make in config.items()}}

    torch.manual_seed(1)
    return Module()


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stands_still_and_the_rest_goes_on_learning(name, paths):
    at_freeze = AtFreeze()
    freeze = StructureFreezeCallback(HEAD, paths=paths, freeze_at_epoch=FREEZE)
    make_trainer(freeze, at_freeze, max_epochs=EPOCHS).fit(module_with(OPTIMIZERS[name]), make_loader())
    assert len(at_freeze.frozen) >= 2
    assert all(torch.equal(parameter, value) for parameter, value in at_freeze.frozen.items())
    assert at_freeze.losses[-1] < at_freeze.losses[0]
