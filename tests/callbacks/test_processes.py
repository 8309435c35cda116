import pytest
from fits import HEAD, SomebodysModule, make_data, make_trainer
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning.callbacks import StructureFreezeCallback


@pytest.mark.processes
def test_somebodys_module_is_not_left_with_an_mlp_in_silence():
    trainer = make_trainer(
        StructureFreezeCallback(HEAD, paths="independent", solver=None, min_steps=0), devices=2, strategy="ddp_fork"
    )
    with pytest.raises(Exception, match="Expected `paths` to be 'output' under a strategy that starts processes"):
        trainer.fit(SomebodysModule(), DataLoader(TensorDataset(*make_data(160)), batch_size=16))
