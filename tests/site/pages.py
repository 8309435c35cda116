"""The pages of a built site: their anchors, what they link to, and which of that is not there."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

#: The address that a site is taken to be at.
ORIGIN = "http://127.0.0.1"
#: Attributes that name something which a browser fetches to show the page.
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}


@dataclass
class Page(HTMLParser):
    """One page.

    Args:
        address: where it is, from the root of the site on.
    """

    address: str
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        for name in ("href", "src"):
            value = values.get(name)
            if value is None or values.get("rel") in ("canonical", "preconnect"):
                continue
            self.links.append(value)
            if (tag, name) in FETCHED:
                self.fetched.append(value)


def read_site(folder: Path) -> dict[str, Page]:
    """Return the pages of a site by their addresses."""
    pages = {}
    for file in sorted(folder.rglob("*.html")):
        page = Page("/" + file.relative_to(folder).as_posix().removesuffix("index.html"))
        page.feed(file.read_text())
        pages[page.address] = page
    return pages


def dead_links(folder: Path) -> list[str]:
    """Return a sentence for every link of a site that leads nowhere, and for what it would fetch from elsewhere."""
    pages, faults = read_site(folder), []
    for page in pages.values():
        for link in page.links:
            target = urlsplit(urljoin(ORIGIN + page.address, link))
            if f"{target.scheme}://{target.netloc}" != ORIGIN:
                if link in page.fetched:
                    faults.append(f"Expected {page.address} to fetch nothing from other hosts, but got {link!r}.")
                continue
            path, anchor = unquote(target.path), unquote(target.fragment)
            if path not in pages and not (folder / path.lstrip("/")).is_file():
                faults.append(f"Expected the link {link!r} of {page.address} to lead to a page, but there is none.")
            elif anchor and path in pages and anchor not in pages[path].anchors:
                faults.append(f"Expected the link {link!r} of {page.address} to lead to a heading, but there is none.")
    return faults
