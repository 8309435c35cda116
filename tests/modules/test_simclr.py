import math

import pytest
import torch
from fits import make_trainer
from lightly.loss import NTXentLoss as LightlyLoss
from lightly.models.modules import SimCLRProjectionHead
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from glai_lightning import ChurnProbe, GLAIHead, SimCLRModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.modules import NTXentLoss
from glai_lightning.solvers import RidgeSolver

FEATURES, HIDDEN, OUTPUTS, CLASSES, SAMPLES = 8, 32, 16, 3, 48


def make_views(num_views=2, samples=SAMPLES, seed=0):
    """Views (V, samples, FEATURES) around one centre for each sample, and the class that the centre is of."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    centres = torch.randn(CLASSES, FEATURES, generator=generator)[labels] * 2
    centres = centres + torch.randn(samples, FEATURES, generator=generator)
    return centres + 0.3 * torch.randn(num_views, samples, FEATURES, generator=generator), labels


class Views(Dataset):
    def __init__(self, num_views=2, labelled=True, samples=SAMPLES):
        self.views, self.labels = make_views(num_views, samples)
        self.labelled = labelled

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        views = [view[index] for view in self.views]
        return (views, self.labels[index]) if self.labelled else (views,)


def loader(batch_size=16, **options):
    return DataLoader(Views(**options), batch_size=batch_size)


def projection_head():
    return SimCLRProjectionHead(FEATURES, HIDDEN, OUTPUTS)


def make_module(head=None, **options):
    seed_everything(3, verbose=False)
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    return SimCLRModule(projection_head() if head is None else head, **options)


EVALUATED = {"knn_neighbors": 5}
SCORES = {"knn_embeddings", "knn_projections"}


@pytest.mark.parametrize(("samples", "temperature", "scale"), [(2, 0.5, 1.0), (33, 0.07, 1e-3), (64, 0.5, 1e4)])
def test_loss_and_gradients_are_those_of_lightly(samples, temperature, scale):
    views = scale * torch.randn(2, samples, OUTPUTS)
    ours, theirs = (views.clone().requires_grad_() for _ in range(2))
    loss, expected = NTXentLoss(temperature)(*ours), LightlyLoss(temperature)(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (scale * loss).backward()
    (scale * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_pairs_of_views():
    module = make_module()
    projections = torch.randn(3, 10, OUTPUTS)
    nt_xent = LightlyLoss(0.5)
    pairs = [nt_xent(projections[i], projections[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(module.loss(projections), sum(pairs) / 3)


@pytest.mark.parametrize("stacked", [True, False], ids=["one tensor", "a list of views"])
def test_backbone_and_head_see_all_views_in_one_call(stacked):
    views, labels = make_views(3, 10)
    seen = []
    backbone, head = nn.Linear(FEATURES, FEATURES), projection_head()
    for module in (backbone, head):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    make_module(head, backbone=backbone).training_step((views if stacked else list(views), labels), 0)
    assert seen == [(30, FEATURES), (30, FEATURES)]


@pytest.mark.parametrize("head", [projection_head, lambda: mlp_head(FEATURES, HIDDEN, OUTPUTS, batch_norm=True)])
def test_training_lowers_the_loss_and_tells_what_the_representation_is_worth(head):
    module = make_module(head(), **EVALUATED)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(), loader())
    first = float(trainer.callback_metrics["val/loss"])
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, loader(), loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/loss"] < first - 0.1
    assert set(logged) == {"train/loss", "val/loss", *(f"val/{name}" for name in SCORES)}
    assert all(logged[f"val/{name}"] > 0.8 for name in SCORES)
    (tested,) = trainer.test(module, loader(), verbose=False)
    assert tested == {name.replace("val/", "test/"): logged[name] for name in logged if name.startswith("val/")}


def test_without_labels_only_the_loss_is_computed():
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(labelled=False), loader(labelled=False))
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss"}


@pytest.mark.parametrize("backbone", [None, lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.2))])
@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_the_evaluation_leaves_the_fit_bitwise_alone(paths, backbone):
    ends = []
    for options in ({}, EVALUATED):
        body = None if backbone is None else backbone()
        module = make_module(backbone=body, freeze_backbone=False, **options)
        if body is not None:
            body[0].load_state_dict({"weight": torch.eye(FEATURES), "bias": torch.zeros(FEATURES)})
        freeze = StructureFreezeCallback(paths=paths, freeze_at_epoch=2, solver=None)
        trainer = make_trainer(freeze, max_epochs=4, gradient_clip_val=0.5)
        trainer.fit(module, loader(), loader())
        held = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
        ends.append((held, freeze.churn_history, module.state_dict()))
    (held, churn, weights), (held_beside, churn_beside, weights_beside) = ends
    assert held == held_beside
    assert churn == churn_beside
    assert weights.keys() == weights_beside.keys()
    assert all(torch.equal(value, weights_beside[name]) for name, value in weights.items())


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_a_fit_cut_before_or_after_the_freeze_resumes_bitwise(paths, tmp_path):
    def run(*callbacks, ckpt_path=None):
        module, freeze = make_module(**EVALUATED), StructureFreezeCallback(paths=paths, freeze_at_epoch=2, solver=None)
        trainer = make_trainer(freeze, *callbacks, max_epochs=4)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    module, metrics = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    assert isinstance(module.head, GLAIHead)
    for epoch in (0, 1, 2):
        resumed, again = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again == metrics
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())


def test_lightlys_head_freezes_up_to_its_last_linear_and_its_outer_batch_norm_goes_on():
    module, freeze = make_module(), StructureFreezeCallback(freeze_at_epoch=1, solver=None)
    trainer = make_trainer(freeze, max_epochs=1)
    trainer.fit(module, loader())
    module.eval()
    views, _ = make_views()
    before = module(views[0])
    trainer.fit_loop.max_epochs = 2

    class Frozen(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.current_epoch == 1 and not hasattr(self, "outputs"):
                pl_module.eval()
                self.outputs = pl_module(views[0])
                pl_module.train()
                self.statistics = pl_module.head.layers[1].running_mean.clone()
                self.outer = pl_module.head.layers[4].running_mean.clone()

    frozen = Frozen()
    trainer.callbacks.append(frozen)
    trainer.fit(module, loader())
    assert torch.equal(frozen.outputs, before)
    trained = {name for name, parameter in module.head.named_parameters() if parameter.requires_grad}
    assert trained == {"layers.3.weight", "layers.4.weight", "layers.4.bias"}
    assert torch.equal(module.head.layers[1].running_mean, frozen.statistics)
    assert not torch.equal(module.head.layers[4].running_mean, frozen.outer)


def test_churn_is_measured_on_all_views():
    module = make_module()
    probe = ChurnProbe(module.head, probe_size=1000)
    module.train().training_step((make_views(3, 10)[0], None), 0)
    assert probe.seen == 30
    assert probe.measure()[1] == 30 * HIDDEN


def test_a_solver_is_refused_for_a_loss_that_it_cannot_solve():
    freeze = StructureFreezeCallback(solver=RidgeSolver(), freeze_at_epoch=1, stop_after_solve=False)
    with pytest.raises(MisconfigurationException, match="loss"):
        make_trainer(freeze, max_epochs=2).fit(make_module(mlp_head(FEATURES, HIDDEN, OUTPUTS)), loader())


def test_prediction_gives_the_embeddings_of_all_views():
    backbone = nn.Linear(FEATURES, 5)
    module = make_module(SimCLRProjectionHead(5, HIDDEN, OUTPUTS), backbone=backbone)
    views, _ = make_views()
    predicted = torch.cat(make_trainer().predict(module, loader()), dim=1)
    torch.testing.assert_close(predicted, backbone(views))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "Expected `temperature` to be a finite number in (0, inf], but got 0.0."),
        ({"temperature": math.nan}, "Expected `temperature` to be a finite number in (0, inf], but got nan."),
        ({"temperature": "hot"}, "Expected `temperature` to be a number in (0, inf], but got 'hot'."),
        ({"knn_neighbors": 0}, "Expected `knn_neighbors` to be an integer of at least 1, but got 0."),
        ({"knn_neighbors": 1.5}, "Expected `knn_neighbors` to be an integer of at least 1, but got 1.5."),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match="Expected") as caught:
        make_module(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(1, 4, FEATURES), None), "at least two views of each sample to contrast, but got 1"),
        ((torch.zeros(2, 1, FEATURES), None), "at least two samples in a batch, .* let the loader drop the last batch"),
        ((torch.zeros(4, FEATURES), None), r"views to have the shape \(views, samples, ...\), .* but got \(4, 8\)"),
        (([torch.zeros(4, 8), torch.zeros(4, 6)], None), r"have the same shape, but got \[\(4, 8\), \(4, 6\)\]"),
        (torch.zeros(2, 4, FEATURES), r"a batch to be `\(views, labels\)`, but got `Tensor`"),
        ((torch.zeros(2, 4, FEATURES), None), "batches with labels for `knn_neighbors`, but got"),
        ((torch.zeros(2, 4, FEATURES),), "batches with labels"),
    ],
)
def test_wrong_batches_are_refused(batch, message):
    module = make_module(**EVALUATED)
    for step in (module.training_step, module.validation_step):
        with pytest.raises(ValueError, match=message):
            step(batch, 0)


class SaveEveryRank(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"weights": pl_module.state_dict(), "logged": logged}, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.processes
def test_two_processes_contrast_with_the_samples_of_both_and_stay_identical(tmp_path):
    # Without BatchNorm, two processes with half of the samples each train as one process with all of them in a batch:
    # how Lightning shuffles them then plays no part.
    def run(folder, paths, batch_size, **options):
        folder.mkdir()
        seed_everything(3, verbose=False)
        head = mlp_head(FEATURES, HIDDEN, OUTPUTS)
        module = make_module(head, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), **EVALUATED)
        freeze = StructureFreezeCallback(paths=paths, freeze_at_epoch=2, solver=None)
        trainer = make_trainer(freeze, SaveEveryRank(folder), max_epochs=8, num_sanity_val_steps=0, **options)
        trainer.fit(module, loader(batch_size), loader(batch_size))
        return [torch.load(path, weights_only=True) for path in sorted(folder.iterdir())]

    # In one test, because what takes long is the interpreter that it runs in.
    for paths in ("output", "tangent", "independent"):
        two = {"devices": 2, "strategy": "ddp_fork"}
        first, second = run(tmp_path / f"{paths}_two", paths, SAMPLES // 2, **two)
        (alone,) = run(tmp_path / f"{paths}_one", paths, SAMPLES)
        assert first["logged"] == second["logged"]
        for name, value in first["weights"].items():
            assert torch.equal(value, second["weights"][name])
            torch.testing.assert_close(value, alone["weights"][name], rtol=1e-4, atol=1e-5)
        for name, value in alone["logged"].items():
            assert first["logged"][name] == pytest.approx(value, rel=1e-4), name
