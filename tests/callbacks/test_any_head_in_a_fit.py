"""Heads that the callback reads from the first call of a fit, and heads whose layers lie at several names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fits import make_trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from glai_lightning import find_heads, glu_head, mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback
from glai_lightning.heads.joined import head_at
from glai_lightning.solvers import LogisticSolver


def loader():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


class Masked(nn.Module):
    def __init__(self, last=3):
        super().__init__()
        self.fc1, self.fc2, self.calls = nn.Linear(6, 12), nn.Linear(12, last), []

    def forward(self, tokens, mask):
        self.calls.append(self.training)
        return {"logits": self.fc2(F.silu(self.fc1(tokens["x"])) * mask)}


class Module(LightningModule):
    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.head = head or Masked()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head({"x": batch[0]}, torch.ones(12))["logits"], batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.parametrize("freeze_at_epoch", [0, 1])
def test_a_head_that_takes_what_cannot_be_made_up_is_read_from_one_call(freeze_at_epoch):
    module, callback = Module(), StructureFreezeCallback(freeze_at_epoch=freeze_at_epoch, verbose=False)
    before = {}
    module.on_train_epoch_start = lambda: before.setdefault(module.current_epoch, module.head.fc1.weight.clone())
    make_trainer(callback, max_epochs=3).fit(module, loader())
    assert callback.frozen
    assert torch.equal(before[2], module.head.fc1.weight)
    assert torch.equal(before[0], before[1]) is (freeze_at_epoch == 0)
    assert module.head.names.chain if hasattr(module.head, "names") else True
    # Each batch once, and one call that reads the head.
    assert len([training for training in module.head.calls if training]) == 3 * 4


def test_a_head_that_cannot_be_frozen_is_refused_on_the_first_batch_before_a_step():
    class Ends(Masked):
        def forward(self, tokens, mask):
            return {"logits": self.fc2(self.fc1(tokens["x"])) * mask[0]}

    module = Module(Ends())
    weight = module.head.fc1.weight.clone()
    with pytest.raises(MisconfigurationException, match="Expected an activation before the last Linear of `Ends`"):
        make_trainer(StructureFreezeCallback(), max_epochs=3).fit(module, loader())
    assert torch.equal(weight, module.head.fc1.weight)


class Layers(LightningModule):
    """Layers on the module itself, and functions between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer_1, self.layer_2, self.layer_3 = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.scores = []

    def forward(self, x):
        x = F.gelu(self.layer_1(x.view(len(x), -1)))
        return F.log_softmax(self.layer_3(torch.relu(self.layer_2(x))), 1)

    def training_step(self, batch, batch_idx):
        return F.nll_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.nll_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


CHAIN = "layer_1+layer_2+layer_3"


def test_a_head_of_layers_on_the_module_itself_is_frozen_and_solved():
    module, callback = Layers(), StructureFreezeCallback(CHAIN, freeze_at_epoch=2, verbose=False)
    make_trainer(callback, max_epochs=5).fit(module, loader(), loader())
    assert callback.frozen
    assert callback.solve_report.loss < callback.solve_report.start_loss
    assert len(callback.churn_history) == 2
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["layer_3.weight", "layer_3.bias"]
    assert type(module) is Layers
    x, y = loader().dataset.tensors
    assert F.nll_loss(module(x), y).item() <= callback.solve_report.loss + 1e-4
    callback.unfreeze()
    assert all(p.requires_grad for p in module.parameters())


class Plain(Layers):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "name", "first", "readings"),
    [
        (lambda: Plain(mlp_head(6, 12, 3)), "head", "head.0", 1),
        (lambda: Plain(mlp_head(6, 12, 3)), "he*", "head.0", 1),
        (lambda: Plain(glu_head(6, 12, 3)), "head", "head.gate", 1),
        (Module, "head", "head.fc1", 1),
        (Layers, CHAIN, "layer_1", 1),
        (lambda: Table(), "body.layers+head", "body.layers.1", 1),
    ],
)
def test_a_head_is_called_once_more_in_a_fit_to_be_read(make, name, first, readings):
    module, calls = make(), []
    module.get_submodule(first).register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(StructureFreezeCallback(name, freeze_at_epoch=0, solver=None, verbose=False), max_epochs=2)
    trainer.fit(module, dicts() if isinstance(module, Table) else loader())
    assert len(calls) == trainer.global_step + readings


def test_a_joined_head_resumes_frozen(tmp_path):
    def run(max_epochs, **options):
        module, callback = Layers(), StructureFreezeCallback(CHAIN, freeze_at_epoch=1, solver=None, verbose=False)
        trainer = make_trainer(callback, max_epochs=max_epochs)
        trainer.fit(module, loader(), **options)
        return module, callback, trainer

    _, callback, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert callback.frozen
    whole = run(4)[0]
    module, callback, _ = run(4, ckpt_path=tmp_path / "two.ckpt")
    assert callback.frozen
    assert callback.freeze_epoch == 1
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole.parameters(), strict=True))


def dicts():
    x, y = loader().dataset.tensors
    return DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=16)


class Table(LightningModule):
    """Layers at two names, between which a forward that takes a dictionary calls functions."""

    def __init__(self, views=1):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"layers": nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 12), nn.GELU())})
        self.head, self.views, self.late = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), views, None

    def forward(self, batch, scale):
        h = self.body["layers"](batch["x"].flatten(1) * scale)
        if self.late is not None:
            h = self.late(h)
        return {"logits": self.head(h.float())}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self(batch, 1.0)["logits"], batch["y"]) for _ in range(self.views))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class KeepFrozen(Callback):
    """Keeps the outputs around the freeze, and the structure after it."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.kept = getattr(self, "kept", [])
        with torch.no_grad():
            outputs = pl_module.eval()(next(iter(dicts())), 1.0)["logits"]
        pl_module.train()
        self.kept.append((outputs, pl_module.head[0].weight.clone()))


def test_a_joined_head_of_a_module_that_takes_a_dictionary_is_read_from_its_step():
    module, watch = Table(), KeepFrozen()
    keys, names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    callback = StructureFreezeCallback("body.layers+head", freeze_at_epoch=2, stop_after_solve=False, verbose=False)
    make_trainer(watch, callback, max_epochs=3).fit(module, dicts())
    assert callback.frozen
    assert len(callback.churn_history) == 2
    assert callback.churn_history[0] > 0
    assert callback.solve_report.loss < callback.solve_report.start_loss
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["head.2.weight", "head.2.bias"]
    assert (list(module.state_dict()), [name for name, _ in module.named_parameters()]) == (keys, names)
    batch = next(iter(dicts()))
    x = module.eval().body["layers"](batch["x"])
    assert torch.equal(module(batch, 1.0)["logits"], head_at(module, "body.layers+head")(batch["x"]))
    assert torch.equal(module(batch, 1.0)["logits"], module.head(x))


def test_a_freeze_of_a_joined_head_is_exact_and_holds_its_structure():
    module, watch = Table(), KeepFrozen()
    options = {"freeze_at_epoch": 1, "solver": None, "verbose": False}
    make_trainer(StructureFreezeCallback("body.layers+head", **options), watch, max_epochs=3).fit(module, dicts())
    unfrozen = Table(), KeepFrozen()
    make_trainer(unfrozen[1], max_epochs=2).fit(unfrozen[0], dicts())
    # The freeze comes before the outputs are kept.
    assert torch.equal(watch.kept[1][0], unfrozen[1].kept[1][0])
    assert torch.equal(watch.kept[1][1], module.head[0].weight)
    assert not torch.equal(watch.kept[0][1], module.head[0].weight)


@pytest.mark.parametrize(("make", "name"), [(Table, "body.layers+head"), (lambda: Dictionary(), "head")])
@pytest.mark.parametrize("within", [False, True])
def test_a_head_that_is_read_on_the_first_batch_resumes(make, name, within, tmp_path):
    def run(max_epochs, max_steps=-1, **options):
        module = make()
        callback = StructureFreezeCallback(name, freeze_at_epoch=1, solver=None, verbose=False)
        trainer = make_trainer(callback, max_epochs=max_epochs, max_steps=max_steps)
        trainer.fit(module, dicts(), **options)
        return module, callback, trainer

    _, callback, trainer = run(2, max_steps=6 if within else -1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    whole = run(4)[0]
    module, callback, _ = run(4, ckpt_path=tmp_path / "cut.ckpt")
    assert callback.freeze_epoch == 1
    if not within:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole.parameters(), strict=True))
    # A test in a process that knows of no call.
    make_trainer(StructureFreezeCallback(name)).validate(make(), dicts(), ckpt_path=tmp_path / "cut.ckpt")


SIZES = {
    "rows": lambda h: h.view(len(h), 12),
    "tokens": lambda h: h.unsqueeze(1).expand(len(h), 3, 12).reshape(len(h) * 3, -1).reshape(len(h), 3, 12).mean(1),
    "a tuple": lambda h: torch.reshape(h, (h.shape[0], 12)),
    "a type": lambda h: h.view(torch.float32),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("made_up", [False, True])
def test_sizes_that_a_forward_computes_between_layers_follow_the_batch(sizes, made_up):
    class Sized(Layers):
        def forward(self, x):
            return F.log_softmax(self.layer_3(torch.relu(self.layer_2(sizes(F.gelu(self.layer_1(x)))))), 1)

    module = Sized()
    x = torch.randn(20, 6)
    if not made_up:
        find_heads(module, loader().dataset[:7])
    assert torch.equal(head_at(module, CHAIN)(x).log_softmax(1), module(x))


def test_what_cannot_stand_between_the_layers_of_a_head_is_refused_on_the_first_batch():
    class Between(Table):
        def forward(self, batch, scale):
            h = self.body["layers"](batch["x"])
            return {"logits": self.head(self.late(h, h))}

    module = Between()
    module.late = nn.Bilinear(12, 12, 12)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"of the head 'body.layers\+head' to take .* `late` does not"):
        make_trainer(StructureFreezeCallback("body.layers+head")).fit(module, dicts())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class TrainAnew(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.train()
        self.kept = [*getattr(self, "kept", []), pl_module.late.running_mean.clone()]


def test_batch_norm_between_the_layers_of_a_head_stands_still_once_they_are_frozen():
    module, watch = Table(), TrainAnew()
    module.late = nn.BatchNorm1d(12)
    callback = StructureFreezeCallback("body.layers+head", freeze_at_epoch=1, solver=None, verbose=False)
    make_trainer(callback, watch, max_epochs=3).fit(module, dicts(), dicts())
    assert not torch.equal(watch.kept[0], watch.kept[1])
    assert torch.equal(watch.kept[1], module.late.running_mean)
    assert not module.late.weight.requires_grad
    assert len(callback.churn_history) == 1


def test_a_joined_head_may_be_called_several_times_with_the_same_steps():
    class Twice(Table):
        def forward(self, batch, scale):
            self.late = nn.Tanh() if self.late is None and self.differs else None
            return super().forward(batch, scale)

    module, Twice.differs = Twice(views=2), False
    callback = StructureFreezeCallback("body.layers+head", freeze_at_epoch=1, solver=None, verbose=False)
    make_trainer(callback, max_epochs=2).fit(module, dicts())
    assert callback.frozen
    Twice.differs = True
    with pytest.raises(MisconfigurationException, match=r"Expected every call of the head .* to take the same steps"):
        make_trainer(StructureFreezeCallback("body.layers+head")).fit(Twice(views=2), dicts())


CALLS = {
    "a dictionary": lambda head, x: head({"x": x}, None),
    "a dictionary and a tensor": lambda head, x: head({"x": x}, torch.ones(len(x), 12)),
    "a number": lambda head, x: head(x, 5.0),
    "a number by name": lambda head, x: head(x, scale=5.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_head_that_is_given_more_than_a_tensor_is_not_solved(call):
    class Takes(Masked):
        def forward(self, x, scale=None):
            h = F.silu(self.fc1(x["x"] if isinstance(x, dict) else x))
            return self.fc2(h if scale is None else h * scale)

    class Step(Module):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(call(self.head, batch[0]), batch[1])

    callback = StructureFreezeCallback(freeze_at_epoch=1, verbose=False)
    # The report says which widths a head has, as far as it was read.
    make_trainer(callback, FitReport(), max_epochs=2).fit(Step(Takes()), loader())
    assert callback.frozen
    assert callback.solve_report is None
    with pytest.raises(MisconfigurationException, match="Expected a head that is given one tensor alone"):
        make_trainer(StructureFreezeCallback(solver=LogisticSolver())).fit(Step(Takes()), loader())


class Dictionary(Module):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(batch, torch.ones(12))["logits"], batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


class Transformer(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.encoder(batch[0].unsqueeze(1).repeat(1, 4, 1)).mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_pattern_names_one_joined_head_for_each_match():
    module = Transformer()
    callback = StructureFreezeCallback("encoder.layers.*.linear1+linear2", freeze_at_epoch=1, verbose=False)
    make_trainer(callback, max_epochs=2).fit(module, loader())
    assert list(callback.heads) == [f"encoder.layers.{i}.linear1+encoder.layers.{i}.linear2" for i in range(2)]
    assert callback.frozen
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {f"encoder.layers.{i}.linear1.{kind}" for i in range(2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("head", "paths", "message"),
    [
        ("layer_2+layer_1", "output", "in the order in which they are called, but that is 'layer_1', 'layer_2'"),
        (CHAIN, "tangent", "Expected `paths` to be 'output' for the head 'layer_1"),
        ("layer_1+layer_4", "output", "Expected `head` to name a module of `Layers`, but got 'layer_1.layer_4'"),
        (["layer_1+layer_2", "layer_2+layer_3"], "output", "to lie apart, but got 'layer_2' inside 'layer_2'"),
        ("layer_1+layer_1", "output", "Expected the layers of the head 'layer_1+layer_1' to lie apart"),
        (
            "layer_1+",
            "output",
            "Expected the names in `head` without blanks, joined by '+' as in 'a+b', but got 'layer_1+'",
        ),
        (["layer_1 + layer_2"], "output", "without blanks, joined by '+' as in 'a+b', but got 'layer_1 + layer_2'"),
    ],
)
def test_chains_that_are_no_head_are_refused(head, paths, message):
    with pytest.raises(MisconfigurationException, match="Expected") as caught:
        make_trainer(StructureFreezeCallback(head, paths)).fit(Layers(), loader())
    assert message.replace("layer_1.layer_4", "layer_1+layer_4") in str(caught.value)


class Ways(nn.Module):
    """A head that goes through other layers in another case."""

    def __init__(self, way):
        super().__init__()
        self.fc, self.a, self.b, self.way = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3), way

    def forward(self, x, other=False):
        h = F.gelu(self.fc(x))
        if self.way == "more" and other:
            h = F.gelu(self.fc(h))
        last = {"output": other, "mode": self.training}.get(self.way, False)
        return self.b(h) if last else self.a(h)


@pytest.mark.parametrize(
    ("way", "taken"), [("output", "'fc', 'b'"), ("more", "'fc', 'fc', 'a'"), ("mode", "'fc', 'b'")]
)
def test_a_head_that_is_called_by_other_ways_is_refused_before_the_first_step(way, taken):
    class Step(Module):
        def training_step(self, batch, batch_idx):
            return sum(F.cross_entropy(self.head(batch[0], other), batch[1]) for other in (False, True))

    module = Step(Ways(way))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=f"read from, 'fc', 'a', but one goes through {taken}"):
        make_trainer(StructureFreezeCallback(solver=None)).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
def test_a_head_that_changes_its_inputs_in_place_is_refused_unless_once_is_enough(paths):
    def head(first):
        return Plain(nn.Sequential(first, nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 3)))

    callback = StructureFreezeCallback(paths=paths, freeze_at_epoch=1, solver=None, verbose=False)
    make_trainer(callback, max_epochs=2).fit(head(nn.ReLU(inplace=True)), loader())
    assert callback.frozen
    with pytest.raises(
        MisconfigurationException, match="to leave its inputs as they are, but it changes them in place"
    ):
        make_trainer(StructureFreezeCallback(paths=paths)).fit(head(nn.SiLU(inplace=True)), loader())


BETWEEN = {
    "`sigmoid`": torch.sigmoid,
    "`div`, `tanh`": lambda z: (z / 3.0).tanh(),
    "`linear`": nn.Linear(3, 3),
}


@pytest.mark.parametrize(("names", "function"), BETWEEN.items(), ids=BETWEEN)
def test_what_bends_the_outputs_before_the_loss_is_named(names, function, caplog):
    class Step(Module):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(function(self.head(batch[0])).squeeze(), batch[1])

    match = f"Between them and the loss the step calls {names}"
    with pytest.raises(MisconfigurationException, match=match):
        make_trainer(StructureFreezeCallback(solver=LogisticSolver())).fit(Step(mlp_head(6, 12, 3)), loader())
    make_trainer(StructureFreezeCallback(), max_epochs=1).fit(Step(mlp_head(6, 12, 3)), loader())
    assert match in caplog.text


class Probabilities(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.fc1, self.fc2, self.returns = nn.Linear(6, 12), nn.Linear(12, 3), returns

    def forward(self, x):
        return self.returns(F.log_softmax(self.fc2(F.gelu(self.fc1(x.flatten(1)))).float(), 1))


@pytest.mark.parametrize(("returns", "read"), [(lambda z: z, lambda z: z), (lambda z: {"p": z}, lambda z: z["p"])])
def test_a_head_that_returns_its_outputs_in_another_form_is_solved(returns, read):
    class Step(Module):
        def training_step(self, batch, batch_idx):
            return F.nll_loss(read(self.head(batch[0])), batch[1])

    module, callback = Step(Probabilities(returns)), StructureFreezeCallback(freeze_at_epoch=2, verbose=False)
    make_trainer(callback, max_epochs=4).fit(module, loader())
    x, y = loader().dataset.tensors
    assert callback.solve_report.loss < 0.5 * callback.solve_report.start_loss
    # The report's loss holds the penalty too.
    assert F.nll_loss(read(module.head(x)), y).item() <= callback.solve_report.loss + 1e-4


def test_a_head_with_a_residual_after_its_last_linear_is_frozen_and_not_solved():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.skip = nn.Linear(6, 12), nn.Linear(12, 3), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x))) + x[:, :3]

    class Step(Module):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1])

    callback = StructureFreezeCallback(freeze_at_epoch=1, verbose=False)
    make_trainer(callback, max_epochs=2).fit(Step(Adds()), loader())
    assert callback.frozen
    assert callback.solve_report is None
    with pytest.raises(MisconfigurationException, match="but got `add` after it"):
        make_trainer(StructureFreezeCallback(solver=LogisticSolver())).fit(Step(Adds()), loader())
