"""The site is built, every page of it read and opened, and every figure on it held against the file that it is from."""

import importlib
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import setuptools
from browser import find_chromium, running_browser
from filelock import FileLock
from markdown.extensions.toc import slugify
from pages import dead_links, read_site

import glai_lightning

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Build the site once, whatever the number of processes that the tests run in."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            built = build("--site-dir", folder)
            assert built.returncode == 0, built.stderr
    return folder


def build(*options, cwd=ROOT):
    """Build a site as `make docs` does."""
    (command,) = re.findall(r"python (-m mkdocs .*)", (ROOT / "Makefile").read_text())
    return subprocess.run(
        [sys.executable, *command.split(), *options], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_make_docs_fails_on_a_dead_link_with_a_sentence(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[a](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: of one page")
    built = build(cwd=tmp_path)
    assert built.returncode != 0
    assert "contains a link 'nowhere.md', but the target is not found" in built.stderr


@pytest.fixture
def served(site):
    """Serve the site, and return where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_every_link_of_every_page_leads_somewhere(site):
    assert len(read_site(site)) > 35
    assert not dead_links(site), "\n".join(dead_links(site))


def test_every_page_opens_in_a_browser_without_an_error(site, served, tmp_path):
    program = find_chromium()
    pages = [address for address in read_site(site) if address != "/404.html"]
    if program is None:
        assert pages
        return
    with running_browser(program, tmp_path) as browser:
        faults = {address: errors for address in pages if (errors := browser.errors_of(served + address))}
        assert browser.errors_of(f"{served}/404.html?") == []
        assert browser.errors_of(f"{served}/nowhere/"), "Expected a page that is not there to be an error."
    assert not faults


def test_the_reference_has_every_public_name(site):
    anchors = {anchor for page in read_site(site).values() if "/reference/" in page.address for anchor in page.anchors}
    packages = [module.name for module in pkgutil.iter_modules(glai_lightning.__path__) if module.ispkg]
    missing = []
    for package in [
        importlib.import_module(f"glai_lightning.{name}") for name in (*packages, "callbacks", "datamodules")
    ]:
        for name in getattr(package, "__all__", []):
            if f"{package.__name__}.{name}" not in anchors and package.__name__ != "glai_lightning.cli":
                missing.append(f"{package.__name__}.{name}")
    named = {anchor.rpartition(".")[2] for anchor in anchors}
    assert not missing + [name for name in glai_lightning.__all__ if name not in named]


@pytest.mark.parametrize(
    ("html", "sentence"),
    [
        ('<a href="nowhere/">', "Expected the link 'nowhere/' of / to lead to a page, but there is none."),
        ('<a href="page/#b">', "Expected the link 'page/#b' of / to lead to a heading, but there is none."),
        ('<script src="https://cdn.example/x.js">', "Expected / to fetch nothing from other hosts"),
        ('<a href="page/#a"><a href="https://example.org"><img src="page/index.html">', None),
    ],
)
def test_a_dead_link_is_found(html, sentence, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text('<h1 id="a">')
    (tmp_path / "index.html").write_text(html)
    faults = dead_links(tmp_path)
    assert len(faults) == (sentence is not None)
    assert all(fault.startswith(sentence) for fault in faults)


@pytest.fixture
def on_an_index(tmp_path, monkeypatch):
    """Return what makes the description that package indexes show of the text of a README."""

    def description(readme):
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "README.md").write_text(readme)
        runpy.run_path(str(tmp_path / "setup.py"))
        return given["long_description"]

    return description


def dead_links_on_an_index(description):
    """Return a sentence for every link of a description that leads to no file or heading of this version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = re.compile(rf"{project['urls']['Source']}/(?:blob|raw)/v{project['version']}/([^#]+)#?(.*)")
    faults = []
    for target in re.findall(r"\]\(([^)]*)\)", description):
        path, anchor = found.groups() if (found := ours.fullmatch(target)) else (None, "")
        if not path and not re.match(r"\w+:|#", target):
            faults.append(f"Expected the link {target!r} of README to be absolute, but it is not.")
        elif path and not (ROOT / path).exists():
            faults.append(f"Expected the link {path!r} of README to lead to a file, but there is none.")
        elif anchor and f"\n{anchor}\n" not in re.sub(
            "^#+ (.*)$", lambda match: slugify(match[1], "-"), (ROOT / path).read_text(), flags=re.MULTILINE
        ):
            faults.append(f"Expected the link '{path}#{anchor}' of README to lead to a heading, but there is none.")
    return faults


def test_every_link_of_readme_leads_to_a_file_of_this_version_on_package_indexes(on_an_index):
    description = on_an_index((ROOT / "README.md").read_text())
    assert "](http" in description
    faults = dead_links_on_an_index(description)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("[a](docs/nowhere.md)", "Expected the link 'docs/nowhere.md' of README to lead to a file, but there is none."),
        ("![a](nowhere.png)", "Expected the link 'nowhere.png' of README to lead to a file, but there is none."),
        ("[a](docs/faq.md#b)", "Expected the link 'docs/faq.md#b' of README to lead to a heading, but there is none."),
    ],
)
def test_a_dead_link_of_readme_is_found(link, sentence, on_an_index):
    assert dead_links_on_an_index(on_an_index(f"[b](recipes) {link} [c](https://example.org)")) == [sentence]


def wrong_figures(text, document, table):
    """Return a sentence for each cell of a table that is not in the document as the files of results have it.

    What the document sets in bold, and what it adds in brackets about expectations, plays no part.
    """

    def plain(row):
        return [re.sub(r"\*\*| \((expected|on the)[^)]*\)|; expected: \w+", "", cell).strip() for cell in row]

    lines = [plain(line.strip("|").split("|")) for line in text.splitlines() if line.startswith("|")]
    header, *rows = map(plain, table)
    if header not in lines:
        return [f"Expected {document} to have a table with the header {header}, but there is none."]
    found = {line[0]: line for line in lines[lines.index(header) + 1 :]}
    return [
        f"Expected {document} to say {row} as the files of results do, but got {found.get(row[0], 'no such row')}."
        for row in rows
        if row not in lines[lines.index(header) :]
    ]


ELSEWHERE = {"headline": "README.md"} | dict.fromkeys(("freeze_rates", "freeze_rules"), "docs/when_to_freeze.md")
COMMITTED = [(ELSEWHERE.get(name, "benchmarks/README.md"), name) for name in tables.TABLES if name != "race"]


@pytest.mark.parametrize(("document", "name"), COMMITTED)
def test_figures_are_those_of_the_files(document, name):
    faults = wrong_figures((ROOT / document).read_text(), document, tables.TABLES[name]())
    assert not faults, "\n".join(faults)


def test_figures_in_prose_are_those_of_the_files():
    rows = {row[0]: [cell.replace("*", "").split(", ") for cell in row[1:]] for row in tables.constant_rate()}
    prose = " ".join((ROOT / "docs" / "alternatives.md").read_text().split())
    (speed, lost) = rows["output, trained on (freezing the inner layers)"][-1]
    assert f"{speed} times as fast at {lost[1:]} points less" in prose
    for side in ("random structure, solved", "independent, matched width (the paper's)"):
        losses = sorted(-float(cell[1]) for cell in rows[side][:-1])
        assert f"lost {losses[0]:.1f} to {losses[-1]:.1f} points" in prose


def test_a_wrong_figure_is_found():
    text = "| | times |\n|---|---|\n| letter | **8.66** (expected: 3) |\n| digits | 0.72 |"
    assert wrong_figures(text, "page", [["", "times"], ["letter", "8.66"], ["digits", "**0.72**"]]) == []
    (fault,) = wrong_figures(text, "page", [["", "times"], ["letter", "8.67"]])
    assert fault == "Expected page to say ['letter', '8.67'] as the files of results do, but got ['letter', '8.66']."
