"""Episodes out of learn2learn's tasksets, with its own transforms, and out of anything that behaves like one."""

import random

import pytest
import torch
from learn2learn.data import MetaDataset, Taskset
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from recording import quiet_trainer
from torch.utils.data import TensorDataset

from glai_lightning import GLAIHead, PrototypicalModule, mlp_head
from glai_lightning.callbacks import StructureFreezeCallback
from glai_lightning.datamodules import EpisodesDataModule
from glai_lightning.datamodules.tasksets import TasksetEpisodes, split_task

CLASSES = {"train": range(8), "val": range(8, 12), "test": range(12, 16)}
SHOTS, QUERIES, WAYS = 2, 3, 3


def meta_dataset(classes):
    labels = torch.tensor(list(classes)).repeat(10)
    inputs = torch.cat([labels.unsqueeze(1).float(), torch.randn(len(labels), 4)], 1)
    return MetaDataset(TensorDataset(inputs, labels))


def taskset(dataset, num_tasks=-1):
    transforms = [NWays(dataset, WAYS), KShots(dataset, SHOTS + QUERIES), LoadData(dataset)]
    transforms += [RemapLabels(dataset), ConsecutiveLabels(dataset)]
    return Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks)


def episodes_from(**options):
    tasksets = [taskset(meta_dataset(classes)) for classes in CLASSES.values()]
    defaults = {"shots": SHOTS, "queries": QUERIES, "train_episodes": 4, "eval_episodes": 5}
    return EpisodesDataModule.from_tasksets(*tasksets, **{**defaults, **options})


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_task_is_split_into_support_and_query_of_the_same_classes():
    episode = episodes_from().episodes["train"][0]
    assert episode["support"].shape == (WAYS * SHOTS, 5)
    assert episode["query"].shape == (WAYS * QUERIES, 5)
    assert sorted(episode["support_labels"].tolist()) == sorted(list(range(WAYS)) * SHOTS)
    assert sorted(episode["query_labels"].tolist()) == sorted(list(range(WAYS)) * QUERIES)
    # The first column is the class in the data: it says which samples belong together.
    of_label = {int(label): x[0] for x, label in zip(episode["support"], episode["support_labels"], strict=True)}
    assert all(of_label[int(label)] == x[0] for x, label in zip(episode["query"], episode["query_labels"], strict=True))
    assert len(torch.cat([episode["support"], episode["query"]]).unique(dim=0)) == WAYS * (SHOTS + QUERIES)


@pytest.mark.parametrize("num_tasks", [-1, 6])
def test_tasks_follow_from_the_seed_and_their_number_alone(num_tasks):
    dataset = meta_dataset(CLASSES["train"])

    def episodes(seed=0):
        tasks = taskset(dataset, num_tasks=num_tasks)
        return TasksetEpisodes(tasks, episodes=6, shots=SHOTS, queries=QUERIES, seeds=(seed, 0))

    forward, backward = episodes(), episodes()
    in_order = [forward[number] for number in range(6)]
    random.seed(99)
    assert all(same(in_order[number], backward[number]) for number in reversed(range(6)))
    assert not same(in_order[0], in_order[1])
    assert not same(in_order[0], episodes(seed=1)[0])


def test_a_finite_taskset_is_read_round_and_round_and_an_endless_one_is_not():
    dataset = meta_dataset(CLASSES["train"])
    finite = TasksetEpisodes(taskset(dataset, num_tasks=3), episodes=3, shots=SHOTS, queries=QUERIES)
    endless = TasksetEpisodes(taskset(dataset), episodes=3, shots=SHOTS, queries=QUERIES)
    assert same(finite[1], finite[4])
    assert not same(endless[1], endless[4])


def test_drawing_tasks_leaves_the_global_generators_alone():
    episodes = episodes_from().episodes["train"]
    random.seed(5)
    expected = random.random()
    random.seed(5)
    _ = episodes[0]
    assert random.random() == expected


def test_a_fit_over_tasksets_freezes_and_is_tested():
    module = PrototypicalModule(mlp_head(5, 8, 4))
    trainer = quiet_trainer(max_epochs=3, callbacks=[StructureFreezeCallback(freeze_at_epoch=1, solver=None)])
    data = episodes_from()
    trainer.fit(module, data)
    assert isinstance(module.head, GLAIHead)
    (scores,) = trainer.test(module, data, verbose=False)
    assert {"test/accuracy", "test/accuracy_interval"} <= set(scores)


class Tasks(list):
    """Nothing of learn2learn: a list of pairs."""


def test_anything_indexable_with_a_length_is_a_taskset():
    tasks = Tasks([(torch.arange(20.0), torch.arange(20) % 4)] * 2)
    data = EpisodesDataModule.from_tasksets(tasks, tasks, tasks, shots=1, queries=4)
    assert data.episodes["val"][0]["support"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_is_no_taskset_is_refused():
    with pytest.raises(TypeError, match="the taskset `val` to have a length and to be indexable, but got generator"):
        EpisodesDataModule.from_tasksets([], (task for task in []), [])


@pytest.mark.parametrize(
    ("samples", "labels", "error", "message"),
    [
        (
            torch.zeros(6),
            torch.tensor([3, 3, 3, 8, 8, 8]),
            ValueError,
            r"at least 4 samples, .* but got class 3 with 3, 8",
        ),
        (torch.zeros(6), torch.full((6,), 2), ValueError, "a task of at least 2 classes, but got 2"),
        (
            torch.zeros(8),
            torch.arange(8).float() % 2,
            TypeError,
            "labels of a task to be integers, but got torch.float32",
        ),
        (
            torch.zeros(8),
            torch.arange(9) % 2,
            ValueError,
            r"a label for each of 8 samples of a task, but got .* \(9,\)",
        ),
        (torch.full((8,), torch.nan), torch.arange(8) % 2, ValueError, "finite numbers, but got 8 NaN"),
        ([1, 2], torch.arange(2), TypeError, "a pair of tensors, samples and labels, but got list and Tensor"),
    ],
)
def test_a_task_that_makes_no_episode_is_refused(samples, labels, error, message):
    with pytest.raises(error, match=message):
        split_task(samples, labels, shots=1, queries=3)
