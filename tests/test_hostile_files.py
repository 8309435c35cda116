"""Files that come from anywhere: nothing in them is executed, and each is answered with a sentence."""

import ast
import os
import pickle
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fits import CLASSES, FEATURES, HEAD, HIDDEN, SomebodysModule, make_loader, make_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from glai_lightning import GLAIHead, HeadModule, SupervisedModule, mlp_head
from glai_lightning.callbacks import FitReport, StructureFreezeCallback, StructureMonitor
from glai_lightning.cli.main import main

ROOT = Path(__file__).parent.parent
SUPERVISED = str(ROOT / "recipes" / "supervised.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


class Harm:
    """What pickle would execute when it reads this."""

    def __reduce__(self):
        return os.mkdir, ("harm-was-done",)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("harm-was-done").exists()


def good_checkpoint(path="good.ckpt"):
    module = SupervisedModule(mlp_head(64, 64, 10))
    trainer = make_trainer(max_epochs=0, logger=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return Path(path)


def write_garbage(path):
    path.write_bytes(bytes(range(256)) * 40)


def write_nothing(path):
    path.write_bytes(b"")


def write_cut_short(path):
    content = good_checkpoint().read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_harm(path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": pl.__version__, "callbacks": Harm()}, path)


def write_plain_pickle(path):
    path.write_bytes(pickle.dumps(Harm()))


def write_broken_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\x05\x00\x00\x00epochq\x01h\x99u.")
        archive.writestr("archive/version", b"3\n")


def write_other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text", "text")


def write_tensor(path):
    torch.save(torch.zeros(3), path)


def write_state_dict_alone(path):
    torch.save(mlp_head(64, 64, 10).state_dict(), path)


def write_harmful_class(path):
    Path("harmful_module.py").write_text("import os; os.mkdir('harm-was-done')")
    checkpoint = torch.load(good_checkpoint(), weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": {"_class_path": "harmful_module.Harm"}}, path)


def write_wrong_entries(path):
    torch.save({"state_dict": [], "pytorch-lightning_version": "2.6.6"}, path)


HOSTILE = [
    (write_garbage, "to be a checkpoint, but it is none, or is cut short"),
    (write_nothing, "to be a checkpoint, but it is none, or is cut short"),
    (write_cut_short, "to be a checkpoint, but it is none, or is cut short"),
    (write_plain_pickle, "to be a checkpoint, but it is none, or is cut short"),
    (write_harm, "to be a checkpoint of tensors and primitives, but it cannot be read as one"),
    (write_broken_pickle, "to be a checkpoint of tensors and primitives, but it cannot be read as one"),
    (write_other_archive, "to be a checkpoint of tensors and primitives, but it cannot be read as one"),
    (write_tensor, "to be a checkpoint, but it holds a `Tensor`"),
    (write_state_dict_alone, "but it lacks `state_dict` and `pytorch-lightning_version`"),
    (write_wrong_entries, "Expected `state_dict` in 'hostile.ckpt' to be what Lightning saves under that name"),
]


def test_pickle_would_have_executed_the_hostile_files():
    write_plain_pickle(Path("hostile.pkl"))
    pickle.loads(Path("hostile.pkl").read_bytes())
    assert Path("harm-was-done").exists()
    Path("harm-was-done").rmdir()


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("write", "sentence"), HOSTILE[2:5], ids=lambda value: getattr(value, "__name__", ""))
def test_the_command_answers_a_hostile_checkpoint_with_a_sentence(command, write, sentence, capsys):
    write(Path("hostile.ckpt"))
    assert main([command, "--config", SUPERVISED, *QUIET, "--ckpt_path", "hostile.ckpt"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert line.startswith("error: Expected ")


@pytest.mark.parametrize(("write", "sentence"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_module_is_not_made_from_a_hostile_checkpoint(write, sentence):
    write(Path("hostile.ckpt"))
    with pytest.raises(ValueError, match="Expected") as caught:
        SupervisedModule.load_from_checkpoint("hostile.ckpt", head=mlp_head(64, 64, 10))
    assert sentence in str(caught.value)


def test_a_checkpoint_of_another_module_is_answered_with_what_does_not_fit(capsys):
    good_checkpoint()
    other = ["--model.head.hidden_features=64", "--model.head.batch_norm=true"]
    assert main(["test", "--config", SUPERVISED, *QUIET, *other, "--ckpt_path", "good.ckpt"]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "head.1.running_mean" in error
    assert "Traceback" not in error


def test_a_module_is_made_from_a_good_checkpoint():
    module = HeadModule.load_from_checkpoint(good_checkpoint(), head=mlp_head(64, 64, 10), strict=False)
    assert not isinstance(module.head, GLAIHead)


@pytest.mark.parametrize("paths", ["output", "tangent", "independent"])
@pytest.mark.parametrize("ours", [True, False])
def test_every_checkpoint_of_a_fit_loads_with_weights_only(paths, ours):
    module = SupervisedModule(mlp_head(FEATURES, HIDDEN, CLASSES)) if ours else SomebodysModule()
    head = "head" if ours else HEAD
    keep = ModelCheckpoint(dirpath="kept", save_top_k=-1, every_n_train_steps=3, save_on_train_epoch_end=False)
    whole = ModelCheckpoint(dirpath="kept", filename="epoch-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [
        FitReport(),
        StructureFreezeCallback(head, paths=paths, freeze_at_epoch=2, solver=None),
        StructureMonitor(head),
    ]
    make_trainer(*callbacks, keep, whole, max_epochs=4).fit(module, make_loader(), make_loader())
    files = list(Path("kept").iterdir())
    assert len(files) > 8
    for file in files:
        assert "state_dict" in torch.load(file, weights_only=True)


PACKAGE = [path for folder in ("glai_lightning", "callbacks", "datamodules") for path in (ROOT / folder).rglob("*.py")]

#: Modules that execute what they read, or hand it to a shell.
_EXECUTING_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "code", "runpy"}
_EXECUTING_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}


def _called(node):
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_package_executes_nothing_that_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & _EXECUTING_MODULES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        assert _called(call) not in _EXECUTING_CALLS
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if _called(call) == "torch.load":
            # An argument of that name is True unless a caller says otherwise: below.
            assert keywords["weights_only"] in ("True", "weights_only")
        if _called(call) in ("np.load", "numpy.load"):
            assert keywords["allow_pickle"] == "False"
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        named = [argument.arg for argument in function.args.kwonlyargs]
        defaults = dict(zip(named, function.args.kw_defaults, strict=True))
        assert ast.unparse(defaults.get("weights_only") or ast.Constant(True)) in ("True", "None")


def test_the_package_was_read_for_what_executes():
    assert len(PACKAGE) > 30


def test_a_checkpoint_names_no_class_to_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    write_harmful_class(Path("hostile.ckpt"))
    assert (
        main(
            ["validate", "--config", SUPERVISED, *QUIET, "--model.head.hidden_features=64", "--ckpt_path=hostile.ckpt"]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda state: [state], "Expected the state of the heads in the checkpoint to be a mapping"),
        (
            lambda state: state | {"heads": {HEAD: {"frozen_": True}}},
            "Expected the state of the head at 'blocks.head' in the checkpoint to hold `frozen`",
        ),
        (
            lambda state: state | {"heads": {HEAD: state["heads"][HEAD] | {"freeze_epoch": "2"}}},
            "to hold `freeze_epoch`, `int | None`, but got '2'",
        ),
        (
            lambda state: state | {"heads": {HEAD: state["heads"][HEAD] | {"churn_history": [None]}}},
            "Expected the state of the churn history of 'blocks.head' in the checkpoint to hold `churn 0`",
        ),
    ],
)
def test_a_fit_does_not_resume_from_a_state_that_the_callback_did_not_save(spoil, sentence):
    def callbacks():
        return [
            StructureFreezeCallback(HEAD, freeze_at_epoch=1, solver=None),
            ModelCheckpoint(dirpath="kept", filename="last"),
        ]

    make_trainer(*callbacks(), max_epochs=2).fit(SomebodysModule(), make_loader())
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if "StructureFreezeCallback" in key]
    checkpoint["callbacks"][key] = spoil(checkpoint["callbacks"][key])
    torch.save(checkpoint, "spoilt.ckpt")
    module = SomebodysModule()
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer(*callbacks(), max_epochs=3).fit(module, make_loader(), ckpt_path="spoilt.ckpt")
    assert sentence in str(caught.value)
    assert not isinstance(module.get_submodule(HEAD), GLAIHead)


def test_names_of_heads_lead_out_of_no_folder():
    # No module is called '..', for names of modules hold no dots; but they may be absolute paths.
    name = f"{Path.cwd()}/escaped"

    class Module(SomebodysModule):
        def __init__(self):
            super().__init__()
            self.blocks[name] = self.blocks.pop("head")

        def forward(self, x):
            return self.blocks[name](self.body(x))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    inner = Path("one/two")
    inner.mkdir(parents=True)
    freeze = StructureFreezeCallback([f"blocks.{name}"], freeze_at_epoch=1, solver=None)
    keep = ModelCheckpoint(dirpath=inner / "kept")
    loggers = [CSVLogger(inner, name="logs"), TensorBoardLogger(inner, name="logs")]
    monitor = StructureMonitor("blocks.*")
    make_trainer(freeze, monitor, FitReport(), keep, logger=loggers, max_epochs=2).fit(Module(), make_loader())
    assert len(list(inner.rglob("*.png"))) == 1
    assert [path.name for path in Path().iterdir()] == ["one"]
    assert [path.name for path in Path("one").iterdir()] == ["two"]
