"""The documentation site: links that lead somewhere, theorem pages that name code and tests that exist."""

import pathlib
import re
import subprocess
import sys

import pytest

import lipbounds as lb

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "generated" not in p.parts)
THEOREMS = sorted(set((DOCS / "theory").glob("*.md")) - {DOCS / "theory" / "index.md"})
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_there_are_pages() -> None:
    assert {"index.md", "guarantees.md", "local.md", "lipsdp.md"} <= {p.name for p in PAGES}
    assert len(THEOREMS) >= 8


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_to_files(page: pathlib.Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = target.split("#")[0]
        if path and not path.startswith(("http://", "https://", "mailto:")) and "generated/" not in path:
            assert (page.parent / path).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", THEOREMS, ids=lambda p: p.stem)
def test_a_theorem_names_its_code_and_the_tests_that_guard_it(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = re.search(r"^- Code: (.*?)(?=^- |\Z)", text, re.M | re.S)
    guard = re.search(r"^- Guarded by (.*?)(?=^- |\Z)", text, re.M | re.S)
    assert code is not None and guard is not None, "a page needs the lines '- Code:' and '- Guarded by'"
    room = ROOT
    for name in re.findall(r"`([\w/.]+\.py)`", code[1]):
        path = ROOT / name if "/" in name else room / name
        assert path.exists(), f"{path} does not exist"
        room = path.parent
    sources = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`(tests/\w+\.py)`", guard[1])
    )
    tests = re.findall(r"`(test_\w+)`", guard[1])
    assert sources and tests
    for test in tests:
        assert f"def {test}(" in sources, f"{test} is in none of the files that the page names"


def test_the_readme_is_one_screen_and_begins_with_a_block_that_the_doors_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 70
    first, door = (
        re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1]  # type: ignore[index]
        for page in (text, (DOCS / "doors.md").read_text(encoding="utf-8"))
    )
    assert first == door  # tests/test_doors.py runs it


def test_figures_are_small_and_shown() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in (*PAGES, ROOT / "README.md")
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith("https://")
    }
    figures = list((DOCS / "figures").iterdir())
    assert {path.resolve() for path in figures} == {path for path in shown if path.parent == DOCS / "figures"}
    assert max(path.stat().st_size for path in figures) < 100_000


def test_every_public_name_has_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    text = generate.public_names()
    missing = [n for n in lb.__all__ if not re.search(rf"lipbounds\.{n}$", text, re.M)]
    assert missing == ["__version__"]
    assert not re.search(r"^\.\. \S+ lipbounds\.(\w+)$(?=[\s\S]*^\.\. \S+ lipbounds\.\1$)", text, re.M), (
        "twice"
    )
    assert ".. autofunction:: lipbounds.analysis.autoattack" in text
    assert ".. autofunction:: lipbounds.training.fit" in text
    sys.modules.pop("generate")


def test_docstrings_become_text_and_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    lines = [
        "The *bound* `x` of y_ and |z|.",
        "",
        "    a * b <= c_",
        "",
        "Then more.",
        "",
        "Args:",
        "    x: a `y`.",
        "Example:",
        "    >>> x.__name__",
    ]
    found = generate.restructured(lines)
    assert found[0] == r"The \*bound\* ``x`` of y\_ and \|z\|."
    assert found[found.index("::") + 2] == "    a * b <= c_"
    assert "Args:" in found and "    x: a ``y``." in found and "    >>> x.__name__" in found
    sys.modules.pop("generate")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_all_rows_of_a_table_have_as_many_cells(page: pathlib.Path) -> None:
    """A bar inside code ends a cell, too, unless it is escaped."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1, table


def test_the_site_shows_formulas_of_notebooks_and_examples_of_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    text = generate.command_line()
    sys.modules.pop("generate")
    assert "Examples:\n\n- lipbounds demo\n\n- lipbounds demo --out" in text and "Examples: -" not in text
    settings: dict[str, list[str]] = {}
    exec(
        re.search(r"^myst_enable_extensions.*", (DOCS / "conf.py").read_text(encoding="utf-8"), re.M)[0],
        settings,
    )  # type: ignore[index]
    formulas = [p for p in (ROOT / "examples").glob("*.ipynb") if "$$" in p.read_text(encoding="utf-8")]
    assert not formulas or "dollarmath" in settings["myst_enable_extensions"]


def test_commands_of_the_benchmarks_page_have_the_options_that_their_scripts_ask_for() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(?:python benchmarks/)?(\w+\.py)([^`]*)`", text)
    assert len(commands) >= 12
    for name, words in commands:
        source = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        for option in re.findall(r'add_argument\(\s*"(--[\w-]+)"[^\n]*required=True', source):
            assert option in words, f"{name} needs {option}"


@pytest.mark.parametrize("script", ["gpu.sh", "gpu_train.sh"])
@pytest.mark.parametrize("words", [(), ("--help",)])
def test_benchmarks_of_the_shell_say_what_they_do(script: str, words: tuple[str, ...]) -> None:
    command = ["bash", str(ROOT / "benchmarks" / script), *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and f"benchmarks/{script} OUT_DIR" in found.stdout


def test_the_examples_of_the_training_page_run_one_after_the_other() -> None:
    """A folder that holds a run is refused, so every example that makes a run has its own."""
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    python = "".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    folders = re.findall(r"lipbounds train .*--out (\S+)", shell) + re.findall(r'out="([^"]+)"', python)
    assert len(folders) == len(set(folders)) >= 5
