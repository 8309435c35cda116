import pytest
import torch
from fits import make_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from glai_lightning import GLAIHead, PrototypicalModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import EpisodesDataModule
from glai_lightning.modules.prototypical import ConfidenceHalfWidth
from glai_lightning.solvers import LogisticSolver

FEATURES, CLASSES = 8, 12


def few_shot_data(**options):
    generator = torch.Generator().manual_seed(0)
    # Three columns tell the classes apart, which training can find out on other classes.
    centres = torch.randn(CLASSES, FEATURES, generator=generator) * torch.tensor([3.0] * 3 + [0.0] * (FEATURES - 3))
    labels = torch.arange(CLASSES * 20) % CLASSES
    inputs = centres[labels] + torch.randn(len(labels), FEATURES, generator=generator)
    defaults = {"ways": 3, "shots": 2, "queries": 5, "train_episodes": 12, "eval_episodes": 10}
    classes = {"train": list(range(6)), "val": [6, 7, 8], "test": [9, 10, 11]}
    return EpisodesDataModule(arrays={"x": inputs, "y": labels}, **{**defaults, "classes": classes, **options})


def few_shot_module(**options):
    torch.manual_seed(0)
    return PrototypicalModule(mlp_head(FEATURES, 32, 16), **options)


def an_episode():
    return dict(few_shot_data().episodes["train"][0])


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_logged_scores_are_means_over_the_episodes_with_their_interval(distance):
    module, data = few_shot_module(distance=distance), few_shot_data()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, data)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    (tested,) = trainer.test(module, data, verbose=False)
    accuracies = []
    for number in range(10):
        episode = data.episodes["test"][number]
        logits, classes = module.eval().episode_logits(episode)
        accuracies.append((classes[logits.argmax(1)] == episode["query_labels"]).float().mean())
    accuracies = torch.stack(accuracies)
    assert tested["test/accuracy"] == pytest.approx(float(accuracies.mean()), abs=1e-6)
    assert tested["test/accuracy_interval"] == pytest.approx(float(1.96 * accuracies.std() / 10**0.5), abs=1e-6)
    assert set(tested) == {"test/loss", "test/accuracy", "test/accuracy_interval"}


def test_the_interval_of_one_episode_is_not_known():
    interval = ConfidenceHalfWidth()
    interval.update(torch.tensor(0.5))
    assert interval.compute().isnan()


def test_training_helps_on_classes_that_were_never_trained_on():
    untrained, trained = few_shot_module(), few_shot_module(optimizer=lambda p: torch.optim.AdamW(p, 3e-3))
    data = few_shot_data(shots=1)
    (before,) = make_trainer().test(untrained, data, verbose=False)
    make_trainer(max_epochs=8).fit(trained, data)
    (after,) = make_trainer().test(trained, data, verbose=False)
    assert after["test/accuracy"] > before["test/accuracy"]


def test_labels_mean_something_within_their_episode_only():
    module, episode = few_shot_module().eval(), an_episode()
    measured = module.measure(episode)
    # An order-preserving map leaves columns where they are, another one moves them: loss and accuracy stay.
    renamed = {key: -1000 - 7 * value if "labels" in key else value for key, value in episode.items()}
    torch.testing.assert_close(module.measure(renamed), measured)


def test_support_and_query_go_through_backbone_and_head_in_one_forward():
    module = PrototypicalModule(mlp_head(FEATURES, 32, 16, batch_norm=True), nn.Identity(), freeze_backbone=False)
    seen = []
    module.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    module.head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    module.training_step(an_episode(), 0)
    assert seen == [3 * (2 + 5)] * 2


def test_predictions_need_no_query_labels():
    module = few_shot_module().eval()
    episode = an_episode()
    unlabelled = {key: value for key, value in episode.items() if key != "query_labels"}
    assert torch.equal(module.predict_step(unlabelled, 0), module.episode_logits(episode)[0])
    predictions = make_trainer().predict(module, few_shot_data())
    assert [tuple(logits.shape) for logits in predictions] == [(15, 3)] * 10


class WeightsAtFreeze(Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        if isinstance(pl_module.head, GLAIHead) and not hasattr(self, "body"):
            self.body = pl_module.backbone[0].weight.detach().clone()


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_the_structure_freezes_in_the_middle_of_a_fit_and_the_backbone_goes_on(paths):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
    module = PrototypicalModule(mlp_head(FEATURES, 32, 16), body, freeze_backbone=False)
    freeze, watch = StructureFreezeCallback(paths=paths, freeze_at_epoch=1, solver=None), WeightsAtFreeze()
    trainer = make_trainer(freeze, watch, max_epochs=3)
    trainer.fit(module, few_shot_data())
    assert isinstance(module.head, GLAIHead)
    assert module.head.paths == paths
    assert len(freeze.churn_history) == 1
    assert freeze.churn_history[0] > 0
    assert not torch.equal(watch.body, body[0].weight)


class SaveEpisodes(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_a_fit_cut_anywhere_ends_in_the_same_weights(tmp_path, paths):
    def fit(*callbacks, ckpt_path=None):
        module = few_shot_module()
        freeze = StructureFreezeCallback(paths=paths, freeze_at_epoch=1, solver=None)
        trainer = make_trainer(freeze, *callbacks, max_epochs=3)
        trainer.fit(module, few_shot_data(train_episodes=4), ckpt_path=ckpt_path)
        return module.state_dict()

    uninterrupted = fit(SaveEpisodes(tmp_path))
    for step in (2, 4, 6, 9):
        resumed = fit(ckpt_path=tmp_path / f"{step}.ckpt")
        assert all(torch.equal(value, resumed[key]) for key, value in uninterrupted.items()), step


def test_a_solver_is_refused_on_the_first_batch():
    freeze = StructureFreezeCallback(solver=LogisticSolver(), freeze_at_epoch=1, stop_after_solve=False)
    with pytest.raises(MisconfigurationException, match="Expected"):
        make_trainer(freeze, max_epochs=2).fit(few_shot_module(), few_shot_data())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"support_labels": torch.zeros(6)}, TypeError, "`support_labels` to be a tensor of integers"),
        ({"query_labels": torch.zeros(15)}, TypeError, "`query_labels` to be a tensor of integers"),
        ({"query_labels": torch.zeros(4, dtype=torch.long)}, ValueError, "a label for each of 15 samples"),
        ({"query_labels": torch.full((15,), 99)}, ValueError, r"every class of the query, but it lacks \[99\]"),
        ({"query": torch.randn(15, 7)}, ValueError, r"one shape in `support` and `query`, but got \(8,\) and \(7,\)"),
        ({"query": torch.randn(0, 8)}, TypeError, r"`query` to be a tensor of at least one sample"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        few_shot_module().training_step(an_episode() | change, 0)


def test_a_batch_that_is_no_episode_is_refused():
    with pytest.raises(TypeError, match=r"Expected a batch to be an episode, a dict of .*, but got `list`"):
        few_shot_module().training_step([torch.zeros(2, 8), torch.zeros(2)], 0)
    episode = an_episode()
    del episode["query_labels"]
    with pytest.raises(TypeError, match=r"it lacks \['query_labels'\]"):
        few_shot_module().training_step(episode, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "manhattan"}, "to be 'squared_euclidean' or 'cosine', but got 'manhattan'"),
        ({"cosine_scale": 0.0}, r"Expected `cosine_scale` to be a finite number in \(0, inf\], but got 0\.0\."),
        ({"cosine_scale": None}, r"Expected `cosine_scale` to be a number in \(0, inf\], but got None\."),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        few_shot_module(**options)


def test_a_head_that_does_not_fit_the_data_is_refused_before_training():
    with pytest.raises(ValueError, match="to take the 8 features of the data, but got a head for 5"):
        make_trainer().fit(PrototypicalModule(mlp_head(5, 8, 4)), few_shot_data())


def test_hyper_parameters_are_what_weights_only_loading_can_hold():
    hparams = {"freeze_backbone": True, "standardise_embeddings": True, "distance": "cosine", "cosine_scale": 10.0}
    assert dict(few_shot_module(distance="cosine").hparams) == hparams
