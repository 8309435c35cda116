"""What a person sees in a terminal of 80 columns."""

import fcntl
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


def in_a_terminal(folder, *arguments):
    """Run a command in a terminal, and return the lines that stand in it and have scrolled out of it at the end."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": "40"}
        glai = str(Path(sys.executable).with_name("glai"))
        os.execv(glai, [glai, *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:
            break
    assert os.waitpid(process, 0)[1] == 0, output.decode()
    return drawn(output.decode())


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


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_messages_stand_above_the_progress_bar_and_the_table_fits(bar, tmp_path):
    if bar.startswith("Rich"):
        pytest.importorskip("rich")
    chosen = [
        *CALLBACKS,
        f"--trainer.callbacks+=lightning.pytorch.callbacks.{bar}",
        "--trainer.callbacks.refresh_rate=1",
    ]
    lines = in_a_terminal(tmp_path, "fit", "--config", RECIPE, *SHORT, *chosen)
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
