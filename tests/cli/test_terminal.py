"""What a person sees in a terminal of 80 columns."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

RECIPE = str(Path(__file__).parent.parent.parent / "recipes" / "supervised.yaml")
SHORT = ["--trainer.accelerator=cpu", "--trainer.max_epochs=5"]
SOLVER = ["--trainer.callbacks.solver=glai_lightning.solvers.LogisticSolver", "--trainer.callbacks.freeze_at_epoch=1"]
CALLBACKS = [
    "--trainer.callbacks=glai_lightning.callbacks.FitReport",
    "--trainer.callbacks+=glai_lightning.callbacks.StructureFreezeCallback",
    *SOLVER,
]
WIDTH = 80
AFTER = "That was one command."


#: Runs a command after another in one interpreter, whose start takes longer than they do.
COMMANDS = f"""
import sys, json
from glai_lightning.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
    print({AFTER!r}, flush=True)
"""


def in_a_terminal(folder, *commands):
    """Run commands in a terminal, and return the lines that each leaves standing in it or scrolls out of it."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": "40"}
        os.execv(sys.executable, [sys.executable, "-c", COMMANDS, json.dumps(commands)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:
            break
    assert os.waitpid(process, 0)[1] == 0, output.decode()
    return [drawn(text) for text in output.decode().split(AFTER)[:-1]]


def drawn(text):
    """Draw characters and the few sequences that progress bars use: to the line's beginning, up, erase the line."""
    lines, row, column = [""], 0, 0
    for sequence, character in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", text):
        if sequence.endswith("A"):
            row = max(0, row - int(sequence[2:-1] or 1))
        elif sequence.endswith("K"):
            lines[row] = lines[row][:column] if sequence in ("\x1b[K", "\x1b[0K") else ""
        elif character == "\r":
            column = 0
        elif character == "\n" or (character and column >= WIDTH):
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        if character and character not in "\r\n":
            lines[row] = f"{lines[row]:<{column}}"[:column] + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return what a fit shows with each progress bar."""
    bars = ["TQDMProgressBar", *(["RichProgressBar"] if importlib.util.find_spec("rich") else [])]
    commands = []
    for bar in bars:
        chosen = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{bar}", "--trainer.callbacks.refresh_rate=1"]
        commands.append(["fit", "--config", RECIPE, *SHORT, *CALLBACKS, *chosen])
    return dict(zip(bars, in_a_terminal(tmp_path_factory.mktemp("terminal"), *commands), strict=True))


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_messages_stand_above_the_progress_bar_and_the_table_fits(bar, shown):
    if bar.startswith("Rich"):
        pytest.importorskip("rich")
    lines = shown[bar]
    words = " ".join(" ".join(lines).split())
    assert re.search(
        r"Froze the structure of 'head' .* paths\): asked to freeze at epoch 1\. Trainable parameters: "
        r"76,810 before, 10,250 now\.",
        words,
    )
    assert re.search(
        r"Solved for the path weights of 'head': \d+ passes .* validation score 0\.\d+ before, 0\.\d+ now", words
    )
    for beginning in ("Froze the structure", "Solved for the path weights"):
        assert any(line.startswith(beginning) for line in lines)
    table = lines[lines.index("Fit report") :]
    assert max(map(len, table)) <= WIDTH
    assert any("solve [s]" in line for line in table)
    # Frozen modules in eval mode and loaders without workers are meant.
    assert "eval mode at the start" not in words
    assert "many workers" not in words
