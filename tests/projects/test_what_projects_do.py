"""What published projects do in their modules, and what was refused for it once."""

import torch
from fits import HEAD, SomebodysModule, make_loader, make_trainer
from torch import nn

from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.solvers import LogisticSolver


class Rescales(nn.Module):
    """Returns outputs in the units of the data, except in training mode; as chemprop's `UnscaleTransform`."""

    def forward(self, outputs):
        return outputs if self.training else 10 * outputs + 3


class RescalingModule(SomebodysModule):
    def __init__(self):
        super().__init__(body=False)
        self.rescale = Rescales()

    def forward(self, x):
        return self.rescale(super().forward(x))

    def on_validation_model_eval(self):
        self.eval()
        self.rescale.train()


class LeavesBodyOut(SomebodysModule):
    """Asks for gradients of a body that no optimizer is given; as lightly's `LinearClassifier`."""

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.body(x))
        return self.blocks["head"](x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.blocks.parameters(), lr=3e-3)


def fit(module, solver):
    callback = StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=solver, verbose=False)
    make_trainer(callback, max_epochs=2).fit(module, make_loader(64))
    return callback.solve_report


def test_a_step_is_read_in_the_modes_that_the_module_validates_in():
    module = RescalingModule()
    assert fit(module, LogisticSolver()) is not None
    assert module.rescale.training


def test_a_body_that_no_optimizer_knows_does_not_count_as_trained():
    assert fit(LeavesBodyOut(), "auto") is not None
