"""Docstrings begin with a noun or a verb, and arrays in public signatures have shapes."""

import ast
import itertools
import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.source_files import sources

SOURCES = sources()
OPERATOR = {"api", "scan", "reference", "weights", "depthwise", "derivatives", "sharding", "saved"}
INSIDE = {name for name in SOURCES if name.startswith("gspn_jax.kernels.") and name.rpartition(".")[2] not in OPERATOR}
"""Modules of the GPU kernels, whose values are tiles spread over threads."""
RIDDLE = re.compile(r"(What|Of|That|Whether|How|Which|Why|Who|Where|When|If|It|They|This|There|Is|Are|Has|Does)\b")
"""First words after which a reader has to guess the noun."""
RIDDLE_OF_AN_ATTRIBUTE = re.compile(r"(What|Of|That|Which|Why|Who|When|If|It|They|This|There|Is|Are|Has|Does)\b")
"""The same, but that a setting may begin with "Whether", "How many" and "Where", as is usual."""
ARRAYS = {"Array", "jax.Array", "jnp.ndarray", "np.ndarray"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(path: pathlib.Path) -> Iterator[ast.Module | Definition]:
    """A module and what others may use of it: names without underscore, not those within functions."""
    tree = ast.parse(path.read_text())
    yield tree
    queue: list[ast.Module | ast.ClassDef] = [tree]
    for scope in queue:
        for node in scope.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    queue.append(node)


def riddles(node: ast.Module | Definition) -> Iterator[str]:
    """First lines of docstrings, of `node` and of its attributes (a string after an assignment), that make one
    guess."""
    text = ast.get_docstring(node) or ""
    if RIDDLE.match(text):
        yield text.splitlines()[0]
    for before, after in itertools.pairwise(node.body):
        if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            text = getattr(after.value, "value", None)
            if isinstance(text, str) and RIDDLE_OF_AN_ATTRIBUTE.match(text):
                yield f"{ast.unparse(before)[:60]}: {text.splitlines()[0]}"


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - INSIDE))
def test_docstrings_begin_with_a_noun_or_a_verb(module):
    nodes = public(SOURCES[module])
    found = [f"{getattr(node, 'name', module)}: {line}" for node in nodes for line in riddles(node)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - INSIDE))
def test_arrays_in_public_signatures_have_shapes(module):
    found = []
    for node in public(SOURCES[module]):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = {argument.arg: argument.annotation for argument in arguments} | {"return": node.returns}
            for name, hint in hints.items():
                if hint is not None and ARRAYS & set(ast.unparse(hint).split(" | ")):
                    found.append(f"{node.name}: {name}: {ast.unparse(hint)}")
    assert not found, "\n".join(found)
