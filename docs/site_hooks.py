"""What mkdocs does to the pages of this folder to make the site: pages from beside it, the reference, the results."""

import ast
import fnmatch
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402

#: What the site shows of the rest of the repository.
BESIDE = ("[!R]*.md", "benchmarks/README.md", "benchmarks/results/*.png", "benchmarks/results/*.md", "recipes/*.md")
PACKAGE = ROOT / "build" / "source" / "glai_lightning"
#: Parts of the package that lie beside its folder.
PARTS = ("callbacks", "datamodules")
#: The pages of the reference: modules, with the names that are documented, ``None`` for all that they export.
REFERENCE: dict[str, dict[str, list[str] | None]] = {
    "callbacks": {"glai_lightning.callbacks": None},
    "solvers": {"glai_lightning.solvers": None},
    "heads": {"glai_lightning.heads": None, "glai_lightning": None},
    "modules": {"glai_lightning.modules": None, "glai_lightning.modules.export": ["export_model"]},
    "datamodules": {"glai_lightning.datamodules": None},
    "backbones": {"glai_lightning.backbones": None},
    "comparison": {"glai_lightning.comparison": None},
}


def on_startup(command: str, dirty: bool) -> None:
    """Lay the package out as it is installed, for the reader of docstrings, which imports nothing."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "glai_lightning", PACKAGE)
    for part in PARTS:
        shutil.copytree(ROOT / part, PACKAGE / part)
    # That reader knows the section by its plural alone.
    for path in PACKAGE.rglob("*.py"):
        path.write_text(re.sub(r"^( +)Example:$", r"\1Examples:", path.read_text(), flags=re.MULTILINE))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in ``docs/``, and put them and others into the navigation by pattern."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    for name in REFERENCE:
        files.append(File.generated(config, f"reference/{name}.md", content=reference_page(name)))
    config.nav = expand(
        config.nav, set(named(config.nav)), sorted(file.src_uri for file in files.documentation_pages())
    )
    return files


def named(nav: list[Any]) -> Iterator[str]:
    """Yield the pages that the navigation names one by one."""
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from named(value) if isinstance(value, list) else [value]


def expand(nav: list[Any], known: set[str], pages: list[str]) -> list[Any]:
    """Return the navigation with pages that it does not name in the place of patterns, and without empty sections."""
    expanded: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            part = expand(value, known, pages) if isinstance(value, list) else value
            expanded += [{title: part}] if part else []
        elif "*" in entry:
            found = [page for page in fnmatch.filter(pages, entry) if page.count("/") == entry.count("/")]
            expanded += [page for page in found if page not in known]
        else:
            expanded.append(entry)
    return expanded


def reference_page(name: str) -> str:
    """Return the page that documents what some modules export."""
    lines = [f"# {name}"]
    for module, names in REFERENCE[name].items():
        members = exported(module) if names is None else names
        lines += ["", f"::: {module}", f"    options: {{members: [{', '.join(members)}]}}"]
    return "\n".join(lines)


def exported(module: str) -> list[str]:
    """Return the names in ``__all__`` of a package; of the first one those alone that are on no other page."""
    text = (PACKAGE.parent / module.replace(".", "/") / "__init__.py").read_text()
    (names,) = re.findall(r"^__all__ = (\[.*?\])", text, flags=re.DOTALL | re.MULTILINE)
    below = [part for page in REFERENCE.values() for part in page if part.startswith(f"{module}.")]
    elsewhere = {name for part in below if part != "glai_lightning.modules.export" for name in exported(part)}
    return [name for name in ast.literal_eval(names) if name not in elsewhere]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put tables out of the files of results in their places, and point links at pages of the site.

    A link to a file of the repository that is not on the site becomes plain text. One to nothing is left to mkdocs,
    which warns.
    """
    markdown = re.sub(r"<!-- table: (\w+) -->", lambda match: tables.as_markdown(tables.TABLES[match[1]]()), markdown)
    folder = posixpath.dirname(page.file.src_uri)
    in_repository = folder if page.file.src_dir == str(ROOT) else posixpath.join("docs", folder)

    def on_the_site(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(in_repository, target))
        if files.get_file_from_path(path.removeprefix("docs/")) is not None:
            return f"{text}({posixpath.relpath(path.removeprefix('docs/'), folder or '.')}{anchor})"
        return text[1:-1] if text[0] == "[" and (ROOT / path).exists() else match[0]

    return re.sub(r"(!?\[[^\]]*\])\((?!\w+:)([^)#]+)(#[^)]*)?\)", on_the_site, markdown)
