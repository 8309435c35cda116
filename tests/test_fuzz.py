"""Malformed arguments, state dicts and checkpoints by the thousand: each is taken, or answered with our sentence."""

import copy
import importlib
import inspect
import io
import math
import re
import tempfile
from collections import OrderedDict

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from torch import nn

from glai_lightning import GLAIHead, HeadModule, freeze_structure, mlp_head
from glai_lightning.backbones import TimmBackbone
from glai_lightning.callbacks import FitReport, StructureFreezeCallback
from glai_lightning.checks import UserError
from glai_lightning.datamodules import EpisodesDataModule, FeaturesDataModule, ViewsDataModule
from glai_lightning.datamodules.arrays import read_archive
from glai_lightning.heads import cache_path_activations, freeze_in_place, output_layers
from glai_lightning.heads.restoring import HeadRestorer
from glai_lightning.modules.checkpoint_file import check_checkpoint
from glai_lightning.solvers import LogisticSolver

#: Examples of each test; their sum is the figure that is promised.
EXAMPLES = {
    "arguments": 1500,
    "heads": 300,
    "state dicts into heads": 400,
    "state dicts into modules": 400,
    "callback states": 150,
    "archives": 150,
    "checkpoint files": 150,
}

# The same examples every time. A failure shows its example; making it smaller would run thousands more.
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


def fuzz(name):
    """Run a test on so many examples, always the same, and report how many there were."""

    def decorate(test):
        def run(record_property, pytestconfig):
            ran = 0
            wanted = pytestconfig.getoption("--fuzz-examples") or EXAMPLES[name]

            @settings(max_examples=wanted, **SETTINGS)
            @given(st.data())
            def examples(data):
                nonlocal ran
                ran += 1
                test(data)

            examples()
            record_property("fuzzed examples", ran)
            assert ran >= wanted

        run.__name__ = test.__name__
        return run

    return decorate


TORCH_SAYS = re.compile(
    r"Missing key|Unexpected key|size mismatch for|expected torch.Tensor or Tensor-like object from checkpoint|"
    r"Expected the state dict of a head frozen with"
)


def answer(call):
    """Return what a call returns, or ``None`` where it is answered with one of our sentences, or torch's on loading."""
    try:
        return call()
    except UserError as error:
        if not re.search(r"Expected .*\bbut\b", str(error), re.DOTALL):
            raise
    except RuntimeError as error:
        first, *rest = str(error).split("\n\t")
        if not ("Error(s) in loading state_dict for" in first and rest and all(map(TORCH_SAYS.search, rest))):
            raise
    return None


def fingerprint(module):
    """Return all that must not have changed after an error."""
    return {
        "modules": [(name, id(child), type(child), child.training) for name, child in module.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, id(p.grad)) for name, p in module.named_parameters()],
        "entries": {key: value.numpy().tobytes() for key, value in module.state_dict().items()},
        "metadata": str(module.state_dict()._metadata),
        "hooks": [
            len(getattr(child, hooks))
            for child in module.modules()
            for hooks in ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
        ],
    }


tensors = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (8,), (8, 5), (3, 8), (3, 8, 5), (9, 5)]).map(torch.zeros)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["output", "tangent", "independent", "max", "head", "zero", "current", "classification"]),
)
anything = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
    tensors,
    st.sampled_from([object(), int, nn.ReLU(), nn.Linear(5, 3), b"bytes", 1j, (1, 2), {3}, np.zeros(2), np.int64(4)]),
)


def some_head(data):
    return mlp_head(5, 8, 3, batch_norm=data.draw(st.booleans()))


PACKAGES = ("", ".backbones", ".callbacks", ".comparison", ".datamodules", ".heads", ".modules", ".solvers")


def public_callables():
    """Return every class and function that a package of ours lists in its ``__all__``."""
    packages = [importlib.import_module(f"glai_lightning{package}") for package in PACKAGES]
    found = {getattr(package, name) for package in packages for name in package.__all__}
    return sorted(filter(callable, found), key=lambda found: (found.__module__, found.__qualname__))


PUBLIC = public_callables()
ROWS, CLASSES = torch.rand(24, 5), torch.arange(24) % 3

#: What a parameter of this name is given where nothing malformed is; a function makes it, because calls change things.
#: A required parameter that is missing here is always given something malformed.
WELL_FORMED = {
    "head": lambda: mlp_head(5, 8, 3),
    "in_features": lambda: 5,
    "hidden_features": lambda: 8,
    "out_features": lambda: 3,
    "x": lambda: ROWS,
    "inputs": lambda: ROWS,
    "features": lambda: ROWS,
    "targets": lambda: CLASSES,
    "weight": lambda: torch.zeros(3, 5),
    "bias": lambda: torch.zeros(3),
    "before": lambda: [ROWS > 0.5],
    "after": lambda: [ROWS > 0.4],
    "churn_history": lambda: [0.4, 0.1, 0.02],
    "arrays": lambda: {"x_train": ROWS, "y_train": CLASSES, "x_test": ROWS, "y_test": CLASSES},
    "name": lambda: "test_resnet",
    "pretrained": lambda: False,
}
#: Parameters of the same name that mean something else.
WELL_FORMED_HERE = {
    (cache_path_activations, "head"): lambda: freeze_structure(mlp_head(5, 8, 3)),
    (output_layers, "head"): lambda: freeze_structure(mlp_head(5, 8, 3)),
    (EpisodesDataModule, "arrays"): lambda: {"x": ROWS, "y": CLASSES},
    (ViewsDataModule, "arrays"): lambda: {"views": torch.rand(2, 24, 5), "y": CLASSES},
}


def well_formed(called, name, parameter):
    """Return what makes a parameter's well-formed argument, ``None`` where the argument may be left out."""
    make = WELL_FORMED_HERE.get((called, name), WELL_FORMED.get(name))
    needed = parameter.default is inspect.Parameter.empty or name in ("arrays", "pretrained")
    return make if needed else None


@fuzz("arguments")
def test_every_public_class_and_function_takes_its_arguments_or_says_what_is_wrong(data):
    called = data.draw(st.sampled_from(PUBLIC))
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(called).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    arguments = {name: make() for name in parameters if (make := well_formed(called, name, parameters[name]))}
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
    chosen = data.draw(st.lists(st.sampled_from(list(parameters)), max_size=3, unique=True)) if parameters else []
    for name in dict.fromkeys([*missing, *chosen]):
        if name == "arrays" and data.draw(st.booleans()):
            arguments["arrays"][data.draw(st.sampled_from(list(arguments["arrays"])))] = data.draw(anything)
        else:
            arguments[name] = data.draw(anything)
    modules = {name: argument for name, argument in arguments.items() if isinstance(argument, nn.Module)}
    before = {name: fingerprint(module) for name, module in modules.items()}
    made = answer(lambda: called(**arguments))
    if made is None:
        assert {name: fingerprint(module) for name, module in modules.items()} == before
    elif isinstance(made, LightningDataModule):
        answer(made.setup)


def test_all_that_is_public_is_fuzzed():
    assert len(PUBLIC) > 30
    assert {StructureFreezeCallback, LogisticSolver, HeadModule, TimmBackbone, ViewsDataModule, mlp_head} <= set(PUBLIC)


layers = st.one_of(
    st.builds(nn.Linear, st.sampled_from([5, 8]), st.sampled_from([3, 8]), bias=st.booleans()),
    st.builds(nn.BatchNorm1d, st.sampled_from([3, 8]), affine=st.booleans(), track_running_stats=st.booleans()),
    st.sampled_from([nn.ReLU, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.Softmax]).map(
        lambda k: k()
    ),
    st.builds(nn.PReLU, st.sampled_from([3, 8])),
    st.sampled_from([lambda: nn.LazyLinear(8), lambda: nn.Linear(8, 8, dtype=torch.complex64)]).map(
        lambda make: make()
    ),
    st.builds(nn.LeakyReLU, st.sampled_from([0.0, -0.5, 2.0, math.nan])),
)


@fuzz("heads")
def test_a_head_is_frozen_or_stays_as_it_was(data):
    parts = [nn.Linear(5, 8), *data.draw(st.lists(layers, max_size=4)), nn.ReLU(), nn.Linear(8, 3)]
    head = nn.Sequential(*parts)
    if any(nn.parameter.is_lazy(p) for p in head.parameters()):
        assert answer(lambda: freeze_structure(head)) is None
        return
    before = fingerprint(head)
    paths = data.draw(st.sampled_from(["output", "tangent", "independent"]))
    max_paths = data.draw(st.sampled_from([1, 10_000_000]))
    frozen = answer(lambda: freeze_in_place(head, paths=paths, max_paths=max_paths))
    if frozen is None:
        assert fingerprint(head) == before
    else:
        assert isinstance(frozen, GLAIHead)
        assert frozen.train()(torch.randn(4, 5)).shape == (4, 3)


def malformed(data, state_dict):
    """Return a state dict with something wrong with it, or not."""
    entries = OrderedDict(state_dict)
    metadata = copy.deepcopy(state_dict._metadata)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(list(entries))) if entries else "0.weight"
        harm = data.draw(
            st.sampled_from(["drop", "replace", "add", "rename", "mark", "no metadata", "metadata", "entry", "key"])
        )
        if harm == "drop":
            entries.pop(key, None)
        elif harm == "replace":
            entries[key] = data.draw(anything)
        elif harm == "add":
            added = data.draw(st.sampled_from(["path_weights", "head.2.path_weights", "2.bias", "x", "0."]))
            entries[added] = data.draw(anything)
        elif harm == "rename":
            entries[f"{key}{data.draw(st.text(max_size=2))}"] = entries.pop(key, None)
        elif harm == "mark" and isinstance(metadata, dict):
            mark = {"paths": data.draw(scalars), "epoch": data.draw(scalars)}
            if data.draw(st.booleans()):
                mark = data.draw(anything)
            for name in ("", "head"):
                if isinstance(metadata.get(name), dict):
                    metadata[name]["glai"] = mark
        elif harm == "no metadata":
            metadata = None
        elif harm == "metadata":
            metadata = data.draw(anything)
        elif harm == "entry" and isinstance(metadata, dict) and metadata:
            metadata[data.draw(st.sampled_from(list(metadata)))] = data.draw(
                st.one_of(anything, st.fixed_dictionaries({"version": anything}))
            )
        elif harm == "key":
            entries[data.draw(st.sampled_from([0, None, (1,), b"0.weight"]))] = torch.zeros(8, 5)
    if metadata is not None:
        entries._metadata = metadata
    return entries


def some_frozen(data, batch_norm):
    head = mlp_head(5, 8, 3, batch_norm=batch_norm)
    paths = data.draw(st.sampled_from([None, "output", "tangent", "independent"]))
    return head if paths is None else freeze_in_place(head, paths=paths, freeze_epoch=data.draw(st.none() | st.just(3)))


@fuzz("state dicts into heads")
def test_a_frozen_head_takes_a_state_dict_or_stays_as_it_was(data):
    batch_norm = data.draw(st.booleans())
    paths = data.draw(st.sampled_from(["output", "tangent", "independent"]))
    target = freeze_in_place(mlp_head(5, 8, 3, batch_norm=batch_norm), paths=paths)
    given_dict = malformed(data, some_frozen(data, batch_norm).state_dict())
    strict, assign = data.draw(st.booleans()), data.draw(st.booleans())
    before = fingerprint(target)
    if answer(lambda: target.load_state_dict(given_dict, strict=strict, assign=assign)) is None:
        assert fingerprint(target) == before


@fuzz("state dicts into modules")
def test_a_module_takes_a_state_dict_or_stays_as_it_was(data):
    batch_norm = data.draw(st.booleans())
    backbone = nn.Linear(5, 5) if data.draw(st.booleans()) else None
    source = HeadModule(some_frozen(data, batch_norm), copy.deepcopy(backbone))
    target = HeadModule(some_frozen(data, batch_norm), backbone)
    restorer = HeadRestorer.of(target, "head")
    restorer.deferred = data.draw(st.booleans())
    given_dict = malformed(data, source.state_dict())
    strict = data.draw(st.booleans())
    before = fingerprint(target)
    if answer(lambda: target.load_state_dict(given_dict, strict=strict)) is None:
        assert fingerprint(target) == before
        assert not restorer.pending
    elif restorer.pending:
        restorer.restore(target)
        assert isinstance(target.head, GLAIHead)


def good_states():
    head = {
        "frozen": False,
        "freeze_epoch": None,
        "freeze_reason": None,
        "churn_history": [0.3],
        "settled": False,
        "solved": False,
        "reverted_at_check": None,
        "snapshot": [{"weight": torch.zeros(8, 5), "bias": torch.zeros(8)}],
    }
    epoch = {"epoch": 0, "seconds": 1.0, "steps": 2, "frozen": False, "churn": None, "score": None}
    epoch |= {"trainable_parameters": 3, "optimizer_state_bytes": 4}
    return {"head": head, "report": {"epochs": [epoch], "mlp_parameters": 5}}


def spoil(data, state):
    if isinstance(state, dict) and state and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(list(state)))
        harm = data.draw(st.sampled_from(["drop", "spoil", "spoil", "add"]))
        if harm == "drop":
            return {name: value for name, value in state.items() if name != key}
        if harm == "add":
            return state | {"more": data.draw(anything)}
        return state | {key: spoil(data, state[key])}
    if isinstance(state, list) and state and data.draw(st.integers(0, 3)):
        return [spoil(data, state[0]), *state[1:]]
    return data.draw(anything)


@fuzz("callback states")
def test_a_callback_takes_up_a_state_or_says_what_is_wrong(data):
    states = good_states()
    kind = data.draw(st.sampled_from(["heads", "report", "loader"]))
    if kind == "heads":
        freeze = StructureFreezeCallback(["head", "other"], solver=None, min_steps=0)
        state = spoil(data, {"heads": {"head": states["head"], "other": states["head"]}, "learning": {}})
        answer(lambda: freeze.load_state_dict(state))
    elif kind == "report":
        report = FitReport()
        state = spoil(data, states["report"])
        answer(lambda: report.load_state_dict(state))
    else:
        arrays = {"x_train": torch.rand(20, 3), "y_train": torch.arange(20) % 3}
        arrays |= {"x_test": torch.rand(20, 3), "y_test": torch.arange(20) % 3}
        loader = FeaturesDataModule(arrays=arrays, batch_size=4).train_dataloader()
        state = spoil(data, loader.state_dict())
        answer(lambda: loader.load_state_dict(state))
        answer(lambda: list(loader))


def broken(data, content):
    """Return bytes with some changed, left out or added."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        harm = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if harm == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif harm == "cut":
            del content[at:]
        elif harm == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del content[at : at + data.draw(st.integers(1, 16))]
    return bytes(content)


def written(save):
    file = io.BytesIO()
    save(file)
    return file.getvalue()


ARCHIVE = written(lambda file: np.savez_compressed(file, a=np.arange(40.0), b=np.ones((3, 2), np.int16)))
PLAIN_ARCHIVE = written(lambda file: np.savez(file, a=np.arange(40.0), b=np.ones((3, 2), np.int16)))


@fuzz("archives")
def test_a_damaged_archive_is_read_or_refused(data):
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(broken(data, data.draw(st.sampled_from([ARCHIVE, PLAIN_ARCHIVE]))))
        file.flush()
        arrays = answer(lambda: read_archive(file.name, required=["a"], optional=["b"]))
    assert arrays is None or all(isinstance(array, np.ndarray) for array in arrays.values())


CHECKPOINT = written(
    lambda file: torch.save(
        {"state_dict": mlp_head(3, 2, 2).state_dict(), "pytorch-lightning_version": "2.6.6", "epoch": 3}, file
    )
)


@fuzz("checkpoint files")
def test_a_damaged_checkpoint_is_read_or_refused(data):
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        file.write(broken(data, CHECKPOINT))
        file.flush()
        answer(lambda: check_checkpoint(file.name))


def test_at_least_two_thousand_examples_are_tried():
    assert sum(EXAMPLES.values()) >= 2000
