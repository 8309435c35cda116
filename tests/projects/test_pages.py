"""The programs of the pages on projects that the extra `examples` installs, shortened, run as their commands say."""

import logging
import re
import textwrap
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent.parent / "docs" / "projects"


@pytest.mark.parametrize(
    ("page", "answer"),
    [
        ("index", "`GLAI_FREEZE` is not heeded"),
        ("chemprop", "frozen and not solved: layers outside the head are trained"),
        ("lightly", "Solved for the path weights of"),
        ("model2vec", "Solved for the path weights of"),
    ],
)
def test_the_program_of_a_page_is_reached_by_its_command(page, answer, monkeypatch, tmp_path, caplog):
    text = (PAGES / f"{page}.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    (head,) = re.findall(r"^GLAI_FREEZE=(\S+) python train.py$", text, flags=re.MULTILINE)
    monkeypatch.setenv("GLAI_FREEZE", head)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, logger="glai_lightning"):
        exec(compile(re.sub(r"max_epochs=\d+", "max_epochs=4", code), page, "exec"), {})
    assert answer in textwrap.shorten(caplog.text, 10_000)
