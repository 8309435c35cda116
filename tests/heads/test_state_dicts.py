import pickle

import pytest
import torch
from torch import nn

from glai_lightning import GLAIHead, mlp_head
from glai_lightning.heads import freeze_in_place
from glai_lightning.heads.restoring import HeadRestorer
from glai_lightning.heads.state_dicts import FreezeMetadata, read_freeze


class Net(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.body, self.head = nn.Linear(5, 5), mlp_head(5, hidden, 3)


def frozen(paths):
    net = Net()
    freeze_in_place(net.head, paths=paths, freeze_epoch=4)
    with torch.no_grad():
        for parameter in net.head.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_the_freeze_is_read_from_the_state_dict_alone(paths):
    state_dict = frozen(paths).state_dict()
    assert read_freeze(state_dict, "head") == FreezeMetadata(paths, 4)
    assert read_freeze(state_dict, "body") is None
    assert read_freeze(Net().state_dict(), "head") is None


@pytest.mark.parametrize(("paths", "found"), [("output", None), ("tangent", "tangent"), ("independent", "independent")])
def test_without_metadata_the_entries_tell_where_they_differ_from_an_mlp(paths, found):
    freeze = read_freeze(dict(frozen(paths).state_dict()), "head")
    assert freeze == (None if found is None else FreezeMetadata(found, None))


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_module_with_an_mlp_loads_a_frozen_head(paths, deferred):
    source, net = frozen(paths), Net()
    restorer = HeadRestorer.of(net, "head")
    restorer.deferred = deferred
    net.load_state_dict(source.state_dict(), strict=True)
    assert isinstance(net.head, GLAIHead) is not deferred
    assert restorer.pending is deferred
    if deferred:
        restorer.restore(net)
    x = torch.randn(9, 5)
    assert net.head.paths == paths
    assert net.head.freeze_epoch == 4
    assert torch.equal(net.head(x), source.head(x))


def test_there_is_one_restorer_for_a_head():
    net = Net()
    assert HeadRestorer.of(net, "head") is HeadRestorer.of(net, "head")
    assert HeadRestorer.of(net, "body") is not HeadRestorer.of(net, "head")


def test_a_module_with_a_restorer_pickles():
    net = Net()
    HeadRestorer.of(net, "head")
    copied = pickle.loads(pickle.dumps(net))
    copied.load_state_dict(frozen("independent").state_dict())
    assert isinstance(copied.head, GLAIHead)
    assert not isinstance(net.head, GLAIHead)


def test_restoring_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="none was loaded"):
        HeadRestorer("head").restore(Net())


def test_other_sizes_are_refused_before_anything_is_loaded():
    net = Net(hidden=9)
    HeadRestorer.of(net, "head")
    body = net.body.weight.clone()
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(8, 5\) as `0.weight` instead of .* shape \(9, 5\)"):
        net.load_state_dict(frozen("output").state_dict())
    assert torch.equal(net.body.weight, body)
