import numpy as np
import pytest
import torch
from recording import quiet_trainer
from torch.utils.data import TensorDataset

from glai_lightning import PrototypicalModule, mlp_head
from glai_lightning.backbones import conv_backbone
from glai_lightning.datamodules import EpisodesDataModule
from glai_lightning.datamodules.loader import EpisodeSampler
from glai_lightning.datamodules.splits import split_classes
from glai_lightning.datamodules.tasksets import NumberedEpisodes, distinct_integers

THIRDS = {"train": [0, 1, 2, 3], "val": [4, 5], "test": [6, 7]}


def labelled(classes=8, per_class=20):
    labels = torch.arange(classes * per_class) % classes
    # The first column numbers the rows; standardisation keeps them apart.
    return {"x": torch.stack([torch.arange(len(labels)).float(), torch.randn(len(labels))], 1), "y": labels}


def episodes_of(**options):
    defaults = {"ways": 2, "shots": 3, "queries": 4, "classes": THIRDS}
    return EpisodesDataModule(
        **{**({} if "dataset" in options or "path" in options else {"arrays": labelled()}), **defaults, **options}
    )


def numbers(rows, **options):
    labels = torch.arange(60) % 6
    inputs = torch.arange(60.0).unsqueeze(1)
    return NumberedEpisodes(inputs, labels, rows, **({"episodes": 10, "ways": 3, "shots": 2, "queries": 5} | options))


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_an_episode_has_distinct_samples_of_distinct_classes_with_their_labels():
    episodes = numbers(torch.arange(60))
    for number in range(200):
        episode = episodes[number]
        drawn = torch.cat([episode["support"], episode["query"]]).flatten()
        labels = torch.cat([episode["support_labels"], episode["query_labels"]])
        assert len(drawn.unique()) == 3 * 7
        assert torch.equal(drawn.long() % 6, labels)
        assert torch.equal(labels[:6].unique(return_counts=True)[1], torch.tensor([2, 2, 2]))
        assert torch.equal(labels[6:].unique(return_counts=True)[1], torch.tensor([5, 5, 5]))


def test_episodes_do_not_depend_on_the_order_they_are_asked_for():
    forward, backward = numbers(torch.arange(60)), numbers(torch.arange(60))
    in_order = [forward[number] for number in range(200)]
    assert all(same(in_order[number], backward[number]) for number in reversed(range(200)))


def test_another_seed_and_another_stream_have_other_episodes():
    first = numbers(torch.arange(60), seeds=(0, 0))[0]
    assert not same(first, numbers(torch.arange(60), seeds=(1, 0))[0])
    assert not same(first, numbers(torch.arange(60), seeds=(0, 1))[0])


def test_only_the_rows_given_are_drawn_even_of_classes_of_different_sizes():
    labels = torch.tensor([0] * 4 + [1] * 9 + [7] * 30)
    inputs = torch.arange(43.0).unsqueeze(1)
    rows = torch.cat([torch.arange(0, 3), torch.arange(5, 13), torch.arange(20, 43)])
    episodes = NumberedEpisodes(inputs, labels, rows, episodes=1, ways=2, shots=1, queries=2)
    drawn = torch.cat([episodes[n][key] for n in range(400) for key in ("support", "query")]).long()
    assert set(drawn.flatten().tolist()) == set(rows.tolist())


def test_all_ordered_selections_are_equally_likely():
    generator = np.random.default_rng(0)
    drawn = distinct_integers(generator, np.full(24_000, 4), 3)
    selections, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(selections) == 24
    # 24,000 draws of 24 selections: five standard deviations are 155.
    assert np.abs(counts - 1000).max() < 155


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_draw_other_training_episodes_and_share_evaluation_out(processes):
    def samplers(fresh):
        return [EpisodeSampler(range(10), fresh=fresh, num_replicas=processes, rank=r) for r in range(processes)]

    evaluated = [number for sampler in samplers(fresh=False) for number in sampler]
    assert sorted(evaluated) == list(range(10))
    assert sum(len(sampler) for sampler in samplers(fresh=False)) == 10
    trained = []
    for epoch in range(3):
        for sampler in samplers(fresh=True):
            sampler.set_epoch(epoch)
            assert len(list(sampler)) == len(sampler) == -(-10 // processes)
            trained += sampler
    assert len(set(trained)) == len(trained)


def test_fewer_episodes_than_processes_are_refused():
    with pytest.raises(ValueError, match="at least one episode for each of 3 processes, but got 2 episodes"):
        EpisodeSampler(range(2), fresh=False, num_replicas=3, rank=0)


def classes_in(data, split):
    episodes = data.episodes[split]
    return set(torch.cat([episodes[number]["query_labels"] for number in range(40)]).tolist())


def test_listed_classes_go_where_they_are_listed():
    data = episodes_of()
    assert {split: classes_in(data, split) for split in THIRDS} == {s: set(c) for s, c in THIRDS.items()}


def test_fractions_share_all_classes_out_without_overlap_by_the_seed():
    def split(seed):
        data = episodes_of(classes={"train": 0.5, "val": 0.25, "test": 0.25}, seed=seed)
        return [classes_in(data, name) for name in THIRDS]

    train, val, test = split(0)
    assert (len(train), len(val), len(test)) == (4, 2, 2)
    assert train | val | test == set(range(8))
    assert split(0) == split(0) != split(5)


def test_groups_of_classes_stay_together():
    alphabets = np.array(["A", "A", "B", "B", "B", "C", "C", "C"])
    for groups in (alphabets, alphabets[labelled()["y"]]):
        data = episodes_of(
            arrays=labelled() | {"alphabet": groups},
            groups="alphabet",
            classes={"train": ["B"], "val": ["C"], "test": ["A"]},
        )
        assert [classes_in(data, split) for split in THIRDS] == [{2, 3, 4}, {5, 6, 7}, {0, 1}]


def test_validation_and_test_may_share_classes_but_no_samples():
    labels = torch.arange(63) % 3
    rows = split_classes(labels, {"train": [0], "val": [1, 2], "test": [2]})
    assert not set(rows["val"].tolist()) & set(rows["test"].tolist())
    assert set(labels[rows["val"]].tolist()) == {1, 2}
    assert set(labels[rows["test"]].tolist()) == {2}
    assert len(rows["test"]) == 10
    assert sum(len(r) for r in rows.values()) == 63


def test_data_with_splits_of_its_own_keeps_them():
    arrays = {}
    for split, classes in THIRDS.items():
        arrays[f"y_{split}"] = torch.tensor(classes).repeat(10)
        arrays[f"x_{split}"] = torch.randn(len(arrays[f"y_{split}"]), 3)
    data = episodes_of(arrays=arrays, classes=None)
    assert {split: classes_in(data, split) for split in THIRDS} == {s: set(c) for s, c in THIRDS.items()}
    arrays["y_test"] = arrays["y_test"] - 3
    with pytest.raises(ValueError, match=r"'train' and 'test' to be disjoint, but both have 3\."):
        episodes_of(arrays=arrays, classes=None).setup()


def test_training_and_test_rows_are_pooled_where_classes_are_given():
    arrays = labelled()
    arrays = {
        f"{key}_{split}": value[half]
        for key, value in arrays.items()
        for split, half in (("train", slice(0, 80)), ("test", slice(80, None)))
    }
    data = episodes_of(arrays=arrays)
    assert classes_in(data, "train") == {0, 1, 2, 3}


def test_features_are_standardised_by_the_training_classes_alone():
    arrays = labelled()
    arrays["x"] = arrays["x"] + 1000 * (arrays["y"] >= 4).unsqueeze(1)
    data = episodes_of(arrays=arrays)
    drawn = torch.cat([data.episodes["train"][number]["query"] for number in range(200)])
    assert drawn.mean(0).abs().max() < 0.1
    assert (drawn.std(0) - 1).abs().max() < 0.1
    assert data.episodes["test"][0]["query"].mean() > 5


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_images_keep_their_shape_and_are_standardised_by_channel(shape):
    images = torch.randint(0, 256, (160, *shape), dtype=torch.uint8)
    data = episodes_of(arrays={"x": images, "y": labelled()["y"]})
    query = torch.cat([data.episodes["train"][number]["query"] for number in range(50)])
    assert query.shape[1:] == shape
    assert query.dtype == torch.float32
    by_channel = query.movedim(1, 0).flatten(1) if len(shape) == 3 else query.flatten().unsqueeze(0)
    assert by_channel.mean(1).abs().max() < 0.05
    assert (by_channel.std(1) - 1).abs().max() < 0.05
    assert data.num_features is None


def test_archives_datasets_and_arrays_make_the_same_episodes(tmp_path):
    arrays = labelled()
    np.savez(tmp_path / "samples.npz", **{key: value.numpy() for key, value in arrays.items()})
    dataset = TensorDataset(arrays["x"], arrays["y"])
    expected = episodes_of(arrays=arrays).episodes["val"][3]
    assert same(expected, episodes_of(path=tmp_path / "samples.npz").episodes["val"][3])
    assert same(expected, episodes_of(dataset=dataset).episodes["val"][3])


def test_labels_may_be_any_integers():
    arrays = labelled()
    arrays["y"] = (arrays["y"] - 3).to(torch.int8) * 11
    data = episodes_of(arrays=arrays, classes={"train": [-33, -22, -11], "val": [0, 11], "test": [22, 33, 44]})
    assert classes_in(data, "train") == {-33, -22, -11}
    assert data.episodes["train"][0]["query_labels"].dtype == torch.int64


class Watching(PrototypicalModule):
    def __init__(self):
        super().__init__(mlp_head(2, 4, 3))
        self.read = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.read["train"].append(batch["query"].clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.read["val"].append(batch["query"].clone())
        super().validation_step(batch, batch_idx)


def test_training_episodes_are_new_in_every_epoch_and_evaluation_episodes_are_not():
    module = Watching()
    quiet_trainer(max_epochs=2).fit(module, episodes_of(train_episodes=5, eval_episodes=3))
    assert len({tuple(query.flatten().tolist()) for query in module.read["train"]}) == 10
    assert torch.equal(torch.stack(module.read["val"][:3]), torch.stack(module.read["val"][3:]))


def test_overfitting_repeats_the_same_episodes():
    module = Watching()
    quiet_trainer(max_epochs=3, overfit_batches=2).fit(module, episodes_of(train_episodes=5, eval_episodes=3))
    assert len(module.read["train"]) == 6
    assert len({tuple(query.flatten().tolist()) for query in module.read["train"]}) == 2


BAD_DATA = [
    ({"ways": 5}, ValueError, r"at least 5 classes in 'train' for episodes of 5 ways, but got 4: 0, 1, 2, 3"),
    ({"shots": 10, "queries": 11}, ValueError, r"at least 21 samples, 10 for the support .* but got class 0 with 20"),
    (
        {
            "arrays": {key: value[8:-1] for key, value in labelled().items()},
            "shots": 4,
            "queries": 15,
        },
        ValueError,
        r"every class in 'test' to have at least 19 samples, .* but got class 7 with 18\.",
    ),
    (
        {"classes": {"train": [0, 1, 2], "val": [2, 3, 1], "test": [4, 5]}},
        ValueError,
        r"'train' and 'val' to be disjoint, but both have 1, 2\.",
    ),
    (
        {"classes": {"train": [0, 1, 2], "val": [3, 5], "test": [4, 0]}},
        ValueError,
        r"'train' and 'test' to be disjoint, but both have 0\.",
    ),
    ({"classes": {"train": [0, 1, 99], "val": [2, 3], "test": [4, 5]}}, ValueError, r"'train', but 99 is not among 0,"),
    (
        {"arrays": labelled() | {"x": torch.full((160, 2), torch.nan)}},
        ValueError,
        "to hold finite numbers, but got 320",
    ),
    (
        {"arrays": labelled() | {"y": torch.zeros(160)}},
        TypeError,
        "`y` to hold integers, class labels, but got torch.f",
    ),
    ({"arrays": labelled() | {"y": torch.zeros(9, dtype=torch.long)}}, ValueError, "a label for each of 160 samples"),
    ({"arrays": {"x": torch.zeros(3, 2)}}, ValueError, "to hold `x`, `y`, but it lacks `y`"),
    ({"arrays": labelled(), "groups": "alphabet"}, ValueError, "to hold `alphabet`, but it lacks"),
    ({"dataset": TensorDataset(torch.zeros(4, 2))}, TypeError, r"sample 0 of `dataset` to be a pair \(tensor, label\)"),
    ({"dataset": [("an image", 0)]}, TypeError, "a pair .* but got `str`"),
    (
        {"dataset": [(torch.zeros(2), 0), (torch.zeros(3), 1)]},
        ValueError,
        r"one shape, but got \(2,\) and, for sample 1",
    ),
    ({"dataset": []}, ValueError, "it is empty"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_DATA)
def test_data_that_cannot_make_episodes_is_refused_before_training(options, error, message):
    with pytest.raises(error, match=message):
        episodes_of(**options).setup()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 1}, ValueError, "Expected `ways` to be an integer of at least 2, but got 1."),
        ({"shots": 0}, ValueError, "Expected `shots` to be an integer of at least 1, but got 0."),
        ({"queries": 0}, ValueError, "Expected `queries` to be an integer of at least 1, but got 0."),
        ({"shots": 1.5}, TypeError, "Expected `shots` to be an integer of at least 1, but got 1.5."),
        ({"train_episodes": 0}, ValueError, "Expected `train_episodes` to be an integer of at least 1, but got 0."),
        ({"eval_episodes": 0}, ValueError, "Expected `eval_episodes` to be an integer of at least 1, but got 0."),
        ({"seed": -1}, ValueError, "Expected `seed` to be an integer of at least 0, but got -1."),
        ({"path": "nowhere.npz"}, ValueError, "Expected `path` to be an existing file, but got 'nowhere.npz'."),
        ({"path": "a.npz", "arrays": {}}, ValueError, "one of .* but got `path` and `arrays`."),
        ({"arrays": None}, ValueError, "one of `path`, `arrays` and `dataset`, but got none."),
        ({"arrays": [1]}, TypeError, "to be a mapping of arrays by key, but got list."),
        (
            {"classes": {"train": 0.5, "val": 0.5}},
            ValueError,
            r"the keys 'train', 'val' and 'test', but got \['train', ",
        ),
        ({"classes": {"train": 0.5, "val": 0.5, "test": 0.5}}, ValueError, "above 0 and to add up to 1"),
        ({"classes": {"train": 0.5, "val": [1], "test": [2]}}, TypeError, "three fractions or three lists"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        episodes_of(**options)


def test_a_convolutional_backbone_is_trained_on_images():
    images = torch.randint(0, 256, (160, 8, 8), dtype=torch.uint8)
    data = episodes_of(arrays={"x": images, "y": labelled()["y"]}, train_episodes=2, eval_episodes=2)
    body = conv_backbone(channels=4, blocks=2)
    module = PrototypicalModule(mlp_head(16, 4, 3), body, freeze_backbone=False)
    before = body[1].weight.detach().clone()
    quiet_trainer(max_epochs=1).fit(module, data)
    assert not torch.equal(before, body[1].weight)
