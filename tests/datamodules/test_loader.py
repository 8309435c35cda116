"""Batches of rows: their sizes, their order, and their shares."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler, TensorDataset

from glai_lightning.datamodules.loader import BatchLoader, SeededBatchSampler


def read(loader):
    return [batch[0].tolist() for batch in loader]


def loader_of(num_rows=10, batch_size=4, seed=0):
    rows = TensorDataset(torch.arange(num_rows))
    return BatchLoader(rows, SeededBatchSampler(num_rows, batch_size, shuffle_seed=seed))


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 5))
def test_rounds_share_all_rows_evenly(num_rows, batch_size, num_shards):
    if num_rows < num_shards:
        num_rows += num_shards
    sampler = SeededBatchSampler(num_rows, batch_size, shuffle_seed=1, num_shards=num_shards)
    batches = list(sampler)
    assert sorted(torch.cat(batches).tolist()) == list(range(num_rows))
    assert len(batches) == len(sampler)
    assert len(sampler) % num_shards == 0
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size + (num_shards > 1)
    last_round = sizes[-num_shards:]
    assert max(last_round) - min(last_round) <= 1
    assert set(sizes[:-num_shards]) <= {batch_size}


def test_one_process_gets_full_batches_and_the_rest():
    assert [len(rows) for rows in SeededBatchSampler(1000, 256)] == [256, 256, 256, 232]


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(ValueError, match="Expected at least one row for each of 2 processes, but got 1 rows"):
        SeededBatchSampler(1, 4, num_shards=2)


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {}
    for seed in range(4):
        sampler = SeededBatchSampler(50, 50, shuffle_seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(next(iter(sampler)).tolist())
            assert tuple(next(iter(sampler)).tolist()) == orders[seed, epoch]
    assert len(set(orders.values())) == 16


def test_reading_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    read(loader_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_picks_up_where_another_left_off():
    loader = loader_of()
    loader.sampler.set_epoch(2)
    whole = read(loader)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = loader_of()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert read(resumed) == whole[1:]
    assert read(resumed) == whole


def test_a_position_of_one_epoch_means_nothing_to_the_next():
    loader = loader_of()
    next(iter(loader))
    resumed = loader_of()
    resumed.load_state_dict(loader.state_dict())
    for each in (resumed, loader):
        each.sampler.set_epoch(1)
    assert read(resumed) == read(loader)


def test_the_state_is_made_of_primitives():
    assert all(type(value) is int for value in loader_of().state_dict().values())


def test_a_sampler_of_single_rows_is_cut_into_batches():
    rows = TensorDataset(torch.arange(10))
    assert read(BatchLoader(rows, SequentialSampler(rows), rows_per_batch=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_loader_survives_pickling():
    loader = loader_of()
    assert read(pickle.loads(pickle.dumps(loader))) == read(loader)
