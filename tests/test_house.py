"""What the source keeps to: files and functions of a readable length, no evaluator beside the walker."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("lipbounds", "training", "analysis", "benchmarks", "tests")
LONGEST_FILE, LONGEST_FUNCTION = 500, 80


def sources(*folders: str) -> Iterator[pathlib.Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the statements of a function, without its signature and docstring."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0  # type: ignore[operator]


@pytest.mark.parametrize("folder", ROOMS)
def test_files_are_short(folder: str) -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources(folder)}
    assert lengths, "no source was read"
    assert not {name: n for name, n in lengths.items() if n > LONGEST_FILE}


def test_functions_are_short() -> None:
    long, seen = {}, 0
    for path in sources("lipbounds", "training", "analysis"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                seen += 1
                if body_lines(node) > LONGEST_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = body_lines(node)
    assert seen > 1000
    assert not long


def test_only_the_walker_runs_the_steps_of_a_program() -> None:
    """A loop over `program.steps` outside it reads the structure or writes another program; these are all of them."""
    structure = {
        "_form/elementwise.py": "writes the elementwise view",
        "_form/program.py": "lifetimes of registers",
        "_form/walk.py": "the walker",
        "_empirical/survey.py": "which taps a tap reads",
        "_gain/step_paths.py": "how often a register is read",
        "_lipsdp/state_matrices.py": "writes the two halves of a form",
        "_triangle/output_rows.py": "which coefficients are differentiated",
    }
    found = set()
    for path in sources("lipbounds"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.For | ast.comprehension) and ".steps" in ast.unparse(node.iter):
                found.add(str(path.relative_to(ROOT / "lipbounds")))
    onnx = {"interop/_onnx_graph.py"}  # its steps are of another kind
    assert found - onnx == set(structure)
