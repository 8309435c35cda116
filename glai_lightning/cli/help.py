"""The help of ``glai``: what there is, grouped, on one page, and the arguments of each class by its name."""

import importlib
import importlib.metadata
import inspect
import textwrap
from typing import Any

from glai_lightning.checks import UserValueError

_WIDTH = 80

#: What can be done, and what each is for.
COMMANDS = {
    "demo": "fit the same head twice, never frozen and frozen and solved: half a minute",
    "fit": "fit a module, freeze its head, test the best checkpoint, print a table",
    "test": "test a checkpoint: glai test --ckpt_path CKPT",
    "validate": "validate a checkpoint",
    "predict": "predict for rows, images or texts: glai predict --ckpt_path CKPT --data FILE",
    "export": "write a model for use without this package: onnx, torch-export, mlp, safetensors",
    "solve": "solve the last layer anew, with samples added or forgotten, from statistics",
    "compare": "measure a configuration beside the same fit that is never frozen",
    "cache": "compute the embeddings of a frozen backbone ahead; --list DIR, --prune DIR",
    "recipes": "list the shipped configurations; with a name, copy one into this folder",
}
_FIRST_STEP = """First step, on data that comes with it:
  glai recipes supervised
  glai fit --config supervised.yaml
"""
_GENERAL = {
    "glai COMMAND --help": "the options of a command, and the classes that it takes",
    "glai fit --help NAME": "the arguments of a class, such as SupervisedModule",
    "--debug": "the traceback of every error, with any command",
    "--version": "the versions of glai-lightning, torch and lightning",
}
_CONFIGURED = {
    "--config FILE": "YAML configuration; later ones override earlier ones",
    "--model CLASS": "the module; --model.NAME VALUE sets an argument of it, --model.head.NAME VALUE one of its head",
    "--data CLASS": "the data module; --data.NAME VALUE sets an argument of it",
    "--trainer.NAME VALUE": "an argument of Lightning's Trainer, such as max_epochs, accelerator or devices",
    "--trainer.callbacks+=CLASS": "one callback more; --trainer.callbacks.NAME VALUE sets an argument of it",
    "--optimizer CLASS": "replaces the optimizer of the module; --optimizer.NAME VALUE, as in --optimizer.lr 0.01",
    "--lr_scheduler CLASS": "replaces its schedule, together with --optimizer",
    "--seed_everything N": "seed of weights, batches and dropout",
    "--print_config": "print the whole configuration, to begin a file of your own with",
}
_CHECKPOINT = {
    "--ckpt_path FILE": "the checkpoint; 'best' and 'last' stand for those of the latest fit",
    "--weights_only BOOL": "false executes what a checkpoint holds: for files that you trust (default: true)",
}
_PREDICTED = {
    "--data FILE": "an .npz file with `x`, a CSV file, or a folder of images, all without labels",
    "--to FILE": "where to write, .csv or .npz (default: predictions.csv)",
}
_EXPORTED = {
    "--ckpt_path FILE": "the checkpoint; 'best' and 'last' stand for those of the latest fit",
    "--to FORMAT": "onnx or torch-export: the model with its preprocessing, for any batch size; mlp: what follows the "
    "backbone, as layers of torch.nn; safetensors: the weights and a description",
    "--output FILE": "the file to write (default: model.onnx, model.pt2, model.pt, model.safetensors)",
    "--shape SIZES": "of one input, as in 3,32,32; only for a backbone of your own",
    "--config FILE": "configuration of the fit, for a module of your own (default: the one beside the checkpoint)",
}
_SOLVED = {
    "--ckpt_path FILE": "the checkpoint of the fit, which describes its module",
    "--config FILE": "configuration of the fit, for a module of your own (default: the one beside the checkpoint)",
    "--statistics FILE": "sums over the samples; read if it is there, and written if samples are added or forgotten",
    "--add DATA": "samples, or statistics of others: an .npz file with `x` and `y` (or `x_train` and `y_train`), a CSV "
    "or parquet file, a folder with a folder of images for each class; may be given several times",
    "--forget DATA": "samples that were added before; may be given several times",
    "--label_column NAME": "column of the targets in a CSV or parquet file (default: label)",
    "--validation DATA": "samples or statistics to choose the penalty by (default: generalised cross-validation)",
    "--l2 X": "the penalty (default: the best of 17)",
    "--head NAME": "ridge, lda or prototypes (default: ridge)",
    "--class_weights balanced": "count all classes alike",
    "--to FILE": "the checkpoint to write (default: beside that of the fit, ending with .solved.ckpt)",
}
_SHORT = {
    "export": ("usage: glai export --ckpt_path CKPT --to FORMAT [--output FILE]", _EXPORTED),
    "solve": ("usage: glai solve --ckpt_path CKPT --statistics FILE [options]", _SOLVED),
}
_COMPARED = {
    "--variants A,B": "what to compare, with commas between, of the variants below",
    "--seeds N": "number of seeds; they begin at --seed_everything, or at 0 (default: 5)",
    "--score NAME": "the validation score (default: what a checkpoint monitors); with --mode min or max",
    "--test_score NAME": "the test score (default: that of the validation with 'test' for 'val')",
    "--head NAME": "name of the head (default: that of the callback)",
    "--patience N": "of early stopping, in validations; null for none (default: 3)",
    "--solver CLASS": "what to solve with (default: that of the callback, or one for the loss)",
    "--margin X": "difference in score up to which a variant is not worse (default: 0.003)",
    "--threads N": "threads that compute on the CPU; null to leave them alone (default: 1)",
    "--to FOLDER": "where to write (default: comparison/NAME below the Trainer's folder)",
}
_ABOUT = {
    "fit": "Fit the module that a configuration describes, and test its best checkpoint.",
    "validate": "Validate a checkpoint.",
    "test": "Test a checkpoint. Its configuration is that of its fit, unless another is given.",
    "predict": "Write predictions. The configuration is that of the fit, unless another is given.",
    "export": "Write the model of a checkpoint to a file for use without this package. A frozen head is written as a "
    "plain MLP where it can be. Install what it needs with the extra `export`.",
    "solve": "Solve the last layer of a trained model anew, in closed form. Samples are added to the statistics, or "
    "taken out of them; the samples of before are not needed. The checkpoint that is written loads as any other.",
    "compare": "Measure, on the fit that a configuration describes, freezing the structure of the head against never "
    "freezing it: the same data, batches, optimizer and schedule, seed by seed. The same command continues a "
    "comparison that was interrupted. Exit codes: 0 faster and not worse, 3 no difference, 4 slower or worse; 1 an "
    "error, 2 arguments that cannot be parsed.",
}
_GROUPS = {
    "Modules": ("glai_lightning", ("Module",)),
    "Heads": ("glai_lightning", ("_head",)),
    "Data modules": ("glai_lightning.datamodules", ("DataModule",)),
    "Backbones": ("glai_lightning.backbones", ("Backbone",)),
    "Callbacks": ("glai_lightning.callbacks", ("",)),
    "Solvers": ("glai_lightning.solvers", ("Solver",)),
}


def overview() -> str:
    """Return what there is, and a first step.

    Example:
        >>> print(overview().splitlines()[0])
        glai: GreenLightningAI heads for PyTorch Lightning
    """
    lines = ["glai: GreenLightningAI heads for PyTorch Lightning", "", _FIRST_STEP, "Commands:", *_listed(COMMANDS)]
    return "\n".join([*lines, "", "Help:", *_listed(_GENERAL)])


def command_help(command: str) -> str:
    """Return the options of a command, and the classes that it takes, each with a sentence.

    Args:
        command: 'fit', 'validate', 'test', 'predict', 'export', 'solve' or 'compare'.
    """
    if command in _SHORT:
        usage, listed = _SHORT[command]
        return "\n".join([usage, "", *textwrap.wrap(_ABOUT[command], _WIDTH), "", "Options:", *_listed(listed)])
    options = {"fit": {}, "predict": _PREDICTED, "compare": _COMPARED}.get(command, {})
    if command != "compare":
        options = {**_CHECKPOINT, **options}
    usage = "--ckpt_path CKPT [options]" if command in ("test", "validate", "predict") else "--config FILE [options]"
    lines = [f"usage: glai {command} {usage}", "", *textwrap.wrap(_ABOUT[command], _WIDTH), ""]
    lines += ["Options:", *_listed(options), "", "Of the configuration:", *_listed(_CONFIGURED)]
    if command == "compare":
        from glai_lightning.comparison.variants import VARIANTS

        described = {variant.name: variant.description for variant in VARIANTS.values()}
        lines += ["", "Variants:", *_listed(described)]
    if command != "fit":
        return "\n".join([*lines, "", "The classes that can be named: glai fit --help"])
    for group, names in _classes().items():
        lines += ["", f"{group}:", *_listed({name: _first_sentence(value) for name, value in names.items()})]
    last = "Arguments of a class: glai fit --help NAME. Any class of your own can be named too."
    return "\n".join([*lines, "", *textwrap.wrap(last, _WIDTH)])


def class_help(name: str) -> str:
    """Return what a class does, and its arguments.

    Args:
        name: name of a module, head, data module, backbone, callback or solver, or the path of any class.

    Raises:
        ValueError: if there is no such class.
    """
    import docstring_parser

    value = _find(name)
    described = docstring_parser.parse(inspect.getdoc(value) or "")
    texts = {parameter.arg_name: parameter.description or "" for parameter in described.params}
    signature = inspect.signature(value)
    arguments = {}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        text = " ".join(_plain(texts.get(parameter.name, "")).split())
        default = "" if parameter.default is parameter.empty else f" (default: {_value(parameter.default)})"
        arguments[parameter.name] = f"{text}{default}".strip()
    lines = [f"{value.__module__}.{value.__qualname__}", ""]
    for paragraph in [described.short_description or "", *(described.long_description or "").split("\n\n")]:
        lines += [*textwrap.wrap(_plain(paragraph), _WIDTH), ""] if paragraph else []
    return "\n".join([*lines, "Arguments:", *_listed(arguments)])


def versions() -> str:
    """Return the versions of this package and of what it stands on."""
    packages = ("glai-lightning", "torch", "lightning")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _classes() -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for group, (module_name, endings) in _GROUPS.items():
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name
        ]
        groups[group] = {name: getattr(module, name) for name in names if name.endswith(endings)}
    return groups


def _find(name: str) -> Any:
    known = {known: value for names in _classes().values() for known, value in names.items()}
    if name in known:
        return known[name]
    module_name, _, class_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserValueError(
            f"Expected the path of a class, or one of {', '.join(map(repr, known))}, but got {name!r}."
        ) from error


def _first_sentence(value: Any) -> str:
    text = _plain(" ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()))
    return text.removesuffix(".")


def _plain(text: str) -> str:
    return text.replace("``", "`")


def _value(value: Any) -> str:
    return value.__qualname__ if inspect.isclass(value) else repr(value)


def _listed(entries: dict[str, str]) -> list[str]:
    """Return names and texts in two columns; a long name has a line of its own."""
    indent = 2 + min(24, max((len(name) for name in entries), default=0)) + 2
    lines = []
    for name, text in entries.items():
        first = f"  {name}"
        if len(first) + 2 > indent:
            lines.append(first)
            first = ""
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=first.ljust(indent), subsequent_indent=" " * indent, break_long_words=False
        ) or [first]
    return lines
