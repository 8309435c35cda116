import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

from glai_lightning.fitting.loaders import WithoutRepeats, draws_at_random, iterate_copy


@pytest.mark.parametrize("samples", [1, 5, 6, 7, 12])
@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_all_processes_together_read_every_sample_once(samples, processes, shuffle, drop_last):
    read = []
    for rank in range(processes):
        options = {"num_replicas": processes, "rank": rank, "shuffle": shuffle, "drop_last": drop_last}
        sampler = DistributedSampler(range(samples), **options)
        own = WithoutRepeats(sampler)
        assert len(list(own)) == len(own)
        assert list(own) == list(sampler)[: len(own)]
        read += own
    assert len(set(read)) == len(read)
    assert len(read) == (samples // processes * processes if drop_last else samples)


def shard(rank, samples=7, **options):
    return DistributedSampler(range(samples), num_replicas=2, rank=rank, shuffle=False, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda data, sampler: DataLoader(data, batch_size=2, sampler=sampler),
        lambda data, sampler: DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
        lambda data, sampler: DataLoader(data, batch_size=None, sampler=sampler),
    ],
    ids=["sampler", "batch sampler", "no batches"],
)
def test_the_batches_of_a_loader_are_read_without_repeats_and_the_loader_keeps_them(make):
    loaders = [make(TensorDataset(torch.arange(7)), shard(rank)) for rank in range(2)]
    read = [torch.cat([batch[0].reshape(-1) for batch in iterate_copy(loader)]).tolist() for loader in loaders]
    assert read == [[0, 2, 4, 6], [1, 3, 5]]
    assert torch.cat([batch[0].reshape(-1) for batch in loaders[1]]).tolist() == [1, 3, 5, 0]


@pytest.mark.parametrize(
    "look", [lambda loader: list(iterate_copy(loader)), lambda loader: draws_at_random(loader, tuple)]
)
def test_looking_at_a_loader_leaves_the_epoch_that_it_is_in_alone(look):
    def epoch(look):
        torch.manual_seed(0)
        drawn = WeightedRandomSampler(torch.ones(40), 40, generator=torch.Generator().manual_seed(0))
        sampler = DistributedSamplerWrapper(drawn, num_replicas=2, rank=0, shuffle=False)
        loader = DataLoader(TensorDataset(torch.arange(40)), batch_size=2, sampler=sampler)
        batches = iter(loader)
        read = next(batches)[0].tolist()
        look(loader)
        return read + [row for batch in batches for row in batch[0].tolist()]

    assert epoch(look) == epoch(lambda _: None)
