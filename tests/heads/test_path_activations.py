import pytest
import torch
from fits import make_trainer
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import seed_everything

from glai_lightning import SimCLRModule, freeze_structure, mlp_head
from glai_lightning.datamodules import DigitViewsDataModule, ViewsDataModule
from glai_lightning.heads.path_activations import cache_path_activations, output_layers


def frozen_head():
    seed_everything(0, verbose=False)
    head = SimCLRProjectionHead(6, 32, 8)
    head(torch.randn(64, 6))
    return freeze_structure(head)


def fit(head, data):
    module = SimCLRModule(head, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    make_trainer(max_epochs=3).fit(module, data)
    return module


def test_training_on_cached_path_activations_trains_the_head_as_training_the_head_does():
    def data():
        return ViewsDataModule(arrays={"views": torch.randn(4, 60, 6, generator=torch.Generator().manual_seed(1))})

    whole, parts = frozen_head(), frozen_head()
    fit(whole, data())
    fit(output_layers(parts), data().path_activations(parts))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value)
    assert not torch.equal(whole.layout.output.weight, frozen_head().layout.output.weight)


def test_activations_are_computed_in_parts_for_inputs_of_any_shape():
    head, inputs = frozen_head().eval(), torch.randn(3, 10, 6, dtype=torch.float64)
    cached = cache_path_activations(head, inputs, rows=7)
    flat = head.path_activations(inputs.float().flatten(0, 1))
    torch.testing.assert_close(cached, flat.reshape(3, 10, -1))
    assert not cached.requires_grad


def test_what_has_no_path_activations_to_cache_is_refused():
    with pytest.raises(ValueError, match="Expected `paths` to be 'output' to train on path activations, but got"):
        output_layers(freeze_structure(mlp_head(4, 8, 3), paths="tangent"))
    with pytest.raises(ValueError, match="Expected cached features to compute path activations of, but got images"):
        DigitViewsDataModule().path_activations(frozen_head())
