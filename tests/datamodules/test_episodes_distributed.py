"""Processes train on different episodes, and share evaluation out: the scores are those of one process."""

import pytest
import torch
from recording import quiet_trainer

from glai_lightning import PrototypicalModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import EpisodesDataModule

pytestmark = pytest.mark.processes

EVAL_EPISODES = 7


class Watching(PrototypicalModule):
    """Notes the queries of every episode, and the scores at the end, in a file of each process."""

    def __init__(self, folder):
        super().__init__(mlp_head(3, 8, 4))
        self.folder = folder
        self.read = {"train": [], "val": [], "test": []}

    def note(self, split, batch):
        self.read[split].append((self.current_epoch, *batch["query"].flatten().tolist()))

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)
        super().validation_step(batch, batch_idx)

    def on_train_end(self):
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        torch.save({**self.read, "scores": scores}, self.folder / f"rank{self.global_rank}.pt")


class TestScores(Watching):
    """Writes down the scores of a test."""

    __test__ = False

    def test_step(self, batch, batch_idx):
        self.note("test", batch)
        super().test_step(batch, batch_idx)

    def on_test_end(self):
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        torch.save({**self.read, "scores": scores}, self.folder / f"rank{self.global_rank}.pt")


def few_shot_data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 8
    inputs = torch.randn(160, 3, generator=generator)
    return EpisodesDataModule(
        arrays={"x": inputs, "y": labels},
        ways=2,
        queries=4,
        train_episodes=5,
        eval_episodes=EVAL_EPISODES,
        classes={"train": [0, 1, 2, 3], "val": [4, 5], "test": [6, 7]},
    )


def run(stage, folder, processes, kind=Watching, callbacks=()):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    options = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    trainer = quiet_trainer(max_epochs=2, callbacks=list(callbacks), **options)
    getattr(trainer, stage)(kind(folder), datamodule=few_shot_data())
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def test_processes_train_on_different_episodes_as_many_each(tmp_path):
    first, second = run("fit", tmp_path, 2)
    assert len(first["train"]) == len(second["train"]) == 2 * 3
    assert len(set(first["train"] + second["train"])) == 12


def test_evaluation_episodes_are_shared_without_repeats_and_are_those_of_one_process(tmp_path):
    (alone,) = run("fit", tmp_path / "one", 1)
    first, second = run("fit", tmp_path / "two", 2)
    for epoch in range(2):
        shared = [query for read in (first, second) for query in read["val"] if query[0] == epoch]
        assert sorted(shared) == sorted(query for query in alone["val"] if query[0] == epoch)
        assert len(shared) == EVAL_EPISODES


def test_scores_and_interval_do_not_depend_on_the_number_of_processes(tmp_path):
    (alone,) = run("test", tmp_path / "one", 1, TestScores)
    both = run("test", tmp_path / "two", 2, TestScores)
    for shared in both:
        assert shared["scores"] == pytest.approx(alone["scores"], abs=1e-6)
    assert len(both[0]["test"]) + len(both[1]["test"]) == EVAL_EPISODES


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_processes_freeze_together_and_log_the_same(tmp_path, paths):
    first, second = run(
        "fit", tmp_path, 2, callbacks=[StructureFreezeCallback(paths=paths, freeze_at_epoch=1, solver=None)]
    )
    assert first["scores"] == second["scores"]
    assert first["scores"]["structure/frozen"] == 1
