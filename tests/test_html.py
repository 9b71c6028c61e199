"""HTML is written in one place, and templates escape what they show."""

import ast
import re
from pathlib import Path

from lipbounds.analysis import report

ROOT = Path(__file__).parents[1]
TAGS = (
    "a abbr b body br button code dd details div dl dt em figure footer form h1 h2 h3 h4 head header hr html i iframe "
    "img input li link main meta ol p pre script section small span strong style sub summary sup svg table tbody td "
    "text tfoot th thead title tr u ul"
).split()
TAG = re.compile(rf"</?(?:{'|'.join(TAGS)})(?:\s[^<>]*)?/?>|<(?:{'|'.join(TAGS)})\s+\w+=|&\w+;")


def _sources():
    return [
        path
        for folder in ("lipbounds", "analysis", "training")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def _html_in(source):
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if TAG.search(node.value):
                yield node.lineno
        elif isinstance(node, ast.JoinedStr):
            text = "".join(p.value if isinstance(p, ast.Constant) else "b" for p in node.values)
            if TAG.search(text):
                yield node.lineno


def test_html_is_written_in_one_place():
    assert list(_html_in('f"<td>{x}</td>"')) and list(_html_in('f"<{tag}>"')) and list(_html_in('x = "&lt;"'))
    assert not list(_html_in('"""<b>"""\nx = "a <= b, c > d"'))
    files = _sources()
    assert len(files) > 90
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if path != ROOT / "lipbounds/_text/html.py"
        for line in _html_in(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"tags are written by lipbounds._text.html alone, or by the templates: {found}"


def test_nothing_is_marked_safe_and_attributes_are_quoted():
    pages = list((ROOT / "analysis/templates").glob("*.html.j2"))
    assert len(pages) == 6 and report.environment().autoescape is True
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*(safe|tojson)\b|autoescape", text), path
        assert not re.search(r"<[^{>]*\w=\{\{", text), f"an attribute without quotes in {path}"
        assert not re.search(r"""(href|src|style|on\w+)="\{\{""", text), f"an address out of data in {path}"
    makers = [
        path for path in _sources() if re.search(r"Markup\(|\bHtml\(", path.read_text(encoding="utf-8"))
    ]
    assert makers == [ROOT / "lipbounds/_text/html.py"]
