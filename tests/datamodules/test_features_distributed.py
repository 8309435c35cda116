"""Two processes share every epoch: no row is left out, none is read twice, and positions are restored."""

import pickle

import pytest
import torch
from recording import Recorder, numbered_rows, quiet_trainer

WORLD_SIZE = 2

pytestmark = pytest.mark.processes


def fit(folder, ckpt_path=None, save_at_step=None, strategy="ddp_fork", data=None, **options):
    """Returns what each process read, from files, because the processes end with the fit."""
    folder.mkdir(exist_ok=True)
    trainer = quiet_trainer(devices=WORLD_SIZE, strategy=strategy, **({"max_epochs": 3} | options))
    module = Recorder(write_to=folder, save_at_step=save_at_step)
    trainer.fit(module, datamodule=numbered_rows() if data is None else data, ckpt_path=ckpt_path)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


def rows_by_epoch(reads, split="train"):
    rows = {}
    for epoch, _, batch in reads[split]:
        rows.setdefault(epoch, []).extend(batch)
    return rows


# 19 rows: two rounds of full batches and three rows left over; 17: one left over, for two processes.
@pytest.mark.parametrize(("num_rows", "num_training_rows"), [(24, 19), (21, 17), (20, 16)])
def test_each_row_is_read_once_an_epoch_by_one_process(tmp_path, num_rows, num_training_rows):
    data = numbered_rows(num_rows)
    first, second = fit(tmp_path, data=data)
    trained_on = sorted(data.splits.train[1].tolist())
    assert len(trained_on) == num_training_rows
    for epoch in range(3):
        shards = rows_by_epoch(first)[epoch], rows_by_epoch(second)[epoch]
        assert sorted(shards[0] + shards[1]) == trained_on
    assert len(first["train"]) == len(second["train"])


def test_the_shuffle_changes_with_the_epoch_in_every_process(tmp_path):
    for reads in fit(tmp_path):
        orders = list(rows_by_epoch(reads).values())
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_validation_rows_are_shared_in_their_order(tmp_path):
    data = numbered_rows()
    first, second = fit(tmp_path, data=data)
    in_order = data.splits.val[1].tolist()
    for epoch in range(3):
        assert rows_by_epoch(first, "val")[epoch] + rows_by_epoch(second, "val")[epoch] == in_order


@pytest.mark.parametrize("save_at_step", [2, 3, 4, 7])
def test_every_process_resumes_with_the_batches_to_come(tmp_path, save_at_step):
    # 19 rows for two processes: three batches an epoch in each.
    uninterrupted = fit(tmp_path / "uninterrupted", save_at_step=save_at_step)
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "uninterrupted" / "saved.ckpt")
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after["train"] == before["train"][save_at_step:]


def test_every_process_resumes_after_an_epoch_with_the_epochs_to_come(tmp_path):
    uninterrupted = fit(tmp_path / "uninterrupted", save_at_step="epoch_end")
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "uninterrupted" / "saved.ckpt")
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after["train"] == before["train"][3:]


def test_a_module_that_was_pickled_for_a_spawned_process_reads_its_share(tmp_path):
    data = numbered_rows()
    first, second = fit(tmp_path, data=pickle.loads(pickle.dumps(data)), max_epochs=1)
    assert sorted(rows_by_epoch(first)[0] + rows_by_epoch(second)[0]) == sorted(data.splits.train[1].tolist())


def test_overfitting_reads_the_same_whole_batches_every_epoch(tmp_path):
    for reads in fit(tmp_path, overfit_batches=1):
        assert [len(batch) for _, _, batch in reads["train"]] == [4, 4, 4]
        assert len({tuple(batch) for _, _, batch in reads["train"]}) == 1
