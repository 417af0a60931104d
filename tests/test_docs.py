"""Pages of documentation: every one is found from docs/README.md, and every relative link leads somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(path for top in ("docs", "tests") for path in (ROOT / top).rglob("*.md"))])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page: pathlib.Path) -> list[tuple[str, str]]:
    """(path, anchor) of the links of a page that lead to files, out of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    found = [target.partition("#") for target in LINK.findall(text) if "://" not in target]
    return [(path, anchor) for path, _, anchor in found]


def anchors(page: pathlib.Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


def test_every_page_is_in_the_index():
    docs = ROOT / "docs"
    linked = {(docs / path).resolve() for path, _ in links(docs / "README.md")}
    pages = [page for page in docs.rglob("*") if page.suffix in (".md", ".ipynb")]
    assert not [page for page in pages if page != docs / "README.md" and page.resolve() not in linked]
    assert docs in {(ROOT / path).resolve().parent for path, _ in links(ROOT / "README.md") if "README" in path}
