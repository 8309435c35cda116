"""The ``glai`` command: fits, validates, tests, predicts, exports and compares, shows a demo, and copies recipes."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from glai_lightning.checks import UserError, UserValueError
from glai_lightning.cli.help import COMMANDS, class_help, command_help, overview, versions
from glai_lightning.cli.recipes import copy_recipe, list_recipes

_WITH_HELP = ("fit", "validate", "test", "predict", "export", "solve", "compare")
#: What a file or a folder that the user names can cause, and a disk that is full.
_USERS_ERRNOS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG),
)
#: Packages whose errors are about the network, or about what is on the other side of it.
_DOWNLOADERS = ("huggingface_hub", "requests", "urllib", "urllib3", "httpx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``glai`` command.

    Args:
        arguments: what follows ``glai`` on the command line; by default the arguments of this process. ``--debug``
            anywhere among them shows the traceback of every error.

    Returns:
        The exit code: 0, or 1 after an error, which is printed as a sentence; of ``glai compare`` also 3 and 4, see
        ``run_comparison``.

    Raises:
        SystemExit: for arguments that cannot be parsed (code 2).

    Example:
        >>> main(["recipes"])  # doctest: +ELLIPSIS
        images        A classifier of images in folders, with a backbone by name and a head that freezes its own...
        multi_gpu     Laid over another recipe, runs it on all GPUs of the machine: one process each, in step.
        prototypical  Few-shot classification by class prototypes, with a head that freezes its own structure, h...
        search        Several heads on the same features, trained together, each frozen and solved on its own; ...
        simclr        Contrastive learning (SimCLR) with a projection head that freezes its own structure, on di...
        supervised    A classifier on feature vectors that freezes its own structure, here on scikit-learn's digits.
        texts         A classifier of texts in a CSV file, with a backbone by name and a head that freezes its o...
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    # Modules of the user's own, named in a configuration, are looked for where the command is called.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return _run(given)
    except Exception as error:
        sentence = _sentence_for_users(error)
        if debug or sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command == "--version":
        print(versions())
        return 0
    if command in ("--help", "-h"):
        print(overview())
        return 0
    if command in _WITH_HELP and arguments[1:] and arguments[1] in ("--help", "-h"):
        print(class_help(arguments[2]) if arguments[2:] else command_help(command))
        return 0
    if command == "recipes":
        _recipes(arguments[1:])
        return 0
    if command == "demo":
        _demo(arguments[1:])
        return 0
    if command not in COMMANDS and not command.startswith("-"):
        raise UserValueError(f"Expected a command, {', '.join(COMMANDS)}, but got '{command}'.")
    options = [option.split("=", 1) for option in _joined(arguments[1:])]
    if command in ("fit", "compare") and not {"--config", "-c", "--model", "--help", "-h"} & {n for n, _ in options}:
        raise UserValueError(
            "Expected `--config` or `--model` to say what is fitted, but got neither. `glai recipes supervised` copies "
            "a configuration to begin with."
        )
    for name, path in options:
        if name in ("--config", "-c") and os.path.isfile(path) and not _is_text(path):
            raise UserValueError(f"Expected `--config` to be a YAML file in UTF-8, but got '{path}'.")
    # Lightning takes seconds to import.
    if command == "compare":
        from glai_lightning.cli.compare import run_comparison

        return run_comparison(arguments[1:])
    if command == "export":
        from glai_lightning.cli.export import run_export

        run_export(arguments[1:])
        return 0
    if command == "solve":
        from glai_lightning.cli.solve import run_solve

        run_solve(arguments[1:])
        return 0
    if command == "cache":
        from glai_lightning.cli.cache import run_cache

        run_cache(arguments[1:])
        return 0
    from glai_lightning.cli.lightning_cli import GlaiCLI, complete
    from glai_lightning.cli.predict import predict_alone

    with warnings.catch_warnings():
        given = {name.removeprefix("--"): value for name, value in options}
        alone = command == "predict" and {"ckpt_path", "data"} <= given.keys() <= {"ckpt_path", "data", "to"}
        if not (alone and predict_alone(given["ckpt_path"], given["data"], given.get("to", "predictions.csv"))):
            GlaiCLI(complete(arguments))
    return 0


def _is_text(path: str) -> bool:
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _joined(arguments: list[str]) -> list[str]:
    """Return options as ``--name=value``, those without a value with an empty one."""
    joined: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or not joined or not joined[-1].endswith("="):
            joined.append(argument if "=" in argument else f"{argument}=")
        else:
            joined[-1] += argument
    return joined


def _recipes(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("glai recipes", description="List the shipped recipes, or copy one of them.")
    parser.add_argument("name", nargs="?", help="recipe to copy; without it, the recipes are listed")
    parser.add_argument("--to", type=Path, default=Path(), help="folder to copy to (default: the current one)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, description in list_recipes().items():
            print(f"{name:<14}{description}")
        return
    path = copy_recipe(options.name, options.to, overwrite=options.overwrite)
    print(f"Copied to {path}. Run it with: glai fit --config {path}")


def _demo(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "glai demo",
        description="Fit a head on a table of letters twice, with the same data, seed and optimizer: never frozen, "
        "with early stopping, and with StructureFreezeCallback. Print both, and draw them.",
    )
    parser.add_argument("--to", type=Path, default=Path("runs/demo"), help="folder for the plot (default: runs/demo)")
    folder = parser.parse_args(arguments).to
    # Lightning takes seconds to import.
    from glai_lightning.cli.demo import run_demo

    run_demo(folder)


def _sentence_for_users(error: BaseException) -> str | None:
    """Return the message of an error that says all there is to say, ``None`` for an error that needs its traceback."""
    for cause in _chain(error):
        if isinstance(cause, UserError):
            return str(cause)
    for cause in _chain(error):
        # Lightning's own sentences for wrong combinations; by name, because most commands get here without Lightning.
        if any(kind.__name__ == "MisconfigurationException" for kind in type(cause).__mro__):
            return str(cause)
        # torch's own list of what does not fit, for a checkpoint of another module.
        if isinstance(cause, RuntimeError) and str(cause).startswith("Error(s) in loading state_dict"):
            return str(cause)
        if any(kind.__module__.split(".")[0] in _DOWNLOADERS for kind in type(cause).__mro__):
            return f"A download failed. {error}"
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        return f"{error.strerror}: '{error.filename}'." if error.filename else f"{error.strerror}."
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
