from types import SimpleNamespace

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
import torch
from fits import HEAD, SomebodysModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from glai_lightning.fitting.heads_in_module import HeadSlot
from glai_lightning.fitting.support import check_optimizers, check_trainer

NAMESPACES = [lightning.pytorch.strategies, pytorch_lightning.strategies]

WORKING = ["SingleDeviceStrategy", "DDPStrategy"]
REFUSED = [
    "FSDPStrategy",
    "ModelParallelStrategy",
    "DeepSpeedStrategy",
    "XLAStrategy",
    "SingleDeviceXLAStrategy",
]
MESSAGE = "Expected the strategy to be a single device or one of 'ddp', .* but got `{}`"


def check(strategy):
    check_trainer(SimpleNamespace(strategy=strategy, callbacks=[]), SomebodysModule())


def unbuilt(kind):
    """An object of a strategy whose own requirements need not be installed."""
    derived = type(kind.__name__, (kind,), {})
    derived.__abstractmethods__ = frozenset()
    return derived.__new__(derived)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_strategy_under_which_no_head_can_be_replaced_is_refused_by_name(namespace, name):
    with pytest.raises(MisconfigurationException, match=MESSAGE.format(name)):
        check(unbuilt(getattr(namespace, name)))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("base", ["Strategy", "ParallelStrategy"])
def test_a_strategy_that_nobody_has_tried_is_refused_by_name(namespace, base):
    with pytest.raises(MisconfigurationException, match=MESSAGE.format("MyStrategy")):
        check(unbuilt(type("MyStrategy", (getattr(namespace, base),), {})))


@pytest.mark.parametrize("name", ["HPUDDPStrategy", "BaguaStrategy", "ColossalAIStrategy"])
def test_a_strategy_of_another_package_that_derives_from_ddp_is_refused_by_name(name):
    with pytest.raises(MisconfigurationException, match=MESSAGE.format(name)):
        check(unbuilt(type(name, (lightning.pytorch.strategies.DDPStrategy,), {})))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", WORKING)
def test_strategies_that_work_and_classes_derived_from_them_pass(namespace, name):
    kind = getattr(namespace, name)
    options = {"device": "cpu"} if name == "SingleDeviceStrategy" else {}
    check(kind(**options))
    check(type("MyOwn", (kind,), {})(**options))


def test_processes_that_average_their_weights_now_and_then_are_refused():
    with pytest.raises(MisconfigurationException, match="but got one with `model_averaging_period=4`"):
        check(lightning.pytorch.strategies.DDPStrategy(model_averaging_period=4))


def test_an_optimizer_that_shards_its_state_is_refused_by_name():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """As torch.distributed.optim has it, which needs a process group."""

    module = SomebodysModule()
    trainer = SimpleNamespace(optimizers=[ZeroRedundancyOptimizer(module.parameters(), 0.1)])
    with pytest.raises(MisconfigurationException, match="but got `ZeroRedundancyOptimizer`"):
        check_optimizers(trainer, HeadSlot(module, HEAD), "output")
