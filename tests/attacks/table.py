"""The rows of attacks as the table of docs/faults.md: python -m tests.attacks.table writes it there."""

import importlib
import pathlib
import re

from tests.attacks.attack import Attack

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- made by python -m tests.attacks.table -->\n", "<!-- end of the table -->\n"


def attacks() -> list[Attack]:
    """All rows, by the point of the list that they belong to."""
    modules = (importlib.import_module(f"tests.attacks.{path.stem}") for path in sorted(FOLDER.glob("test_*.py")))
    found = [row for module in modules for row in getattr(module, "ATTACKS", ())]
    return sorted(found, key=lambda row: (row.kind[0], int(row.kind[1:] or 0)))


def table() -> str:
    """The rows in Markdown."""
    lines = ["| | what is done | what comes of it | the sentence has |", "|---|---|---|---|"]
    for row in attacks():
        words = (row.says,) if isinstance(row.says, str) else row.says
        said = " ... ".join(re.sub(r"\{(\w+)\}", r"\1", word) for word in words)
        outcome = row.code if isinstance(row.code, str) else f"exit code {row.code}"
        lines.append(f"| {row.kind} | {cell(row.done)} | {outcome} | {cell(said)} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """`text` in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(text: str) -> str:
    """docs/faults.md with the rows of today between its markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
