"""Names that look like HTML, Markdown, terminal codes or formulas are shown as they are and never run."""

import dataclasses
import io
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli import evaluate, tables
from lipbounds._cli.main import app
from lipbounds._comparison.bracket import Bracket
from lipbounds._comparison.compare import Comparison
from lipbounds._comparison.compare import Row as Compared
from lipbounds._local.local import LocalBounds
from lipbounds._margins.radius import Radii
from lipbounds._text.html import Html, element, together
from lipbounds._text.tables import html_table, markdown_table, markdown_text, printable, text_table
from lipbounds.analysis import (
    diagnostics,
    evaluation_report,
    figures,
    forging_report,
    forging_study,
    masking,
    report,
    training_report,
)
from lipbounds.results import Estimate, LowerBound, Part, UpperBound
from lipbounds.training.config import Config

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "</code><img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    "&amp; &lt;b&gt;",
    "</table></pre></style>",
    "two\nlines",
    "[red]bold[/] [/] :warning:",
    "[a](javascript:alert(1)) `code` *x* | bar",
    "\x1b[2J\x1b]0;title\x07",
    r"$\undefined{x$ and $y",
)
ALL = " ".join(HOSTILE)
PLAIN = " ".join(name for name in HOSTILE if name.isprintable())


class Page(HTMLParser):
    """The tags, the attributes and the text of a page as a browser would read them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data):
        self.text += data


def check_page(page, *names):
    found = Page(page)
    assert not found.tags & {"script", "iframe", "link", "object"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name != "href" or not value.startswith("javascript:")
        assert name != "src" or value.startswith("data:image/png;base64,")
    for name in names:
        assert name in found.text, f"{name!r} is not shown as it is"


def check_markdown(text):
    for code in re.findall(r"(?<!\\)(?:\\\\)*<[A-Za-z/!?][^>]*>?", text):
        assert code == "<br>", code
    assert not re.search(r"(?<!\\)\]\(", text) and "\x1b" not in text


def test_the_writer_escapes_text_and_attributes():
    inner = element("b", *HOSTILE)
    page = element("div", inner, *HOSTILE, title=ALL)
    check_page(page, *HOSTILE)
    assert Page(page).tags == {"div", "b"} and Page(page).attributes == [("title", ALL)]
    assert isinstance(together("<", inner), Html) and together("<", inner) == "&lt;" + inner


# ----------------------------------------------------------------------------------------------------- results
def _results():
    part = Part(ALL, ALL, (2, 3), 1.0, "verified", ALL)
    common = {"norm": 2, "method": ALL, "seconds": 0.1, "notes": (ALL,)}
    upper = UpperBound(value=2.0, guarantee="verified", parts=(part,), **common)
    lower = LowerBound(value=1.0, **common)
    yield upper
    yield dataclasses.replace(upper, parts=())
    yield Estimate(value=1.5, **common)
    yield lower
    yield Bracket(lower, upper)
    yield Radii(np.ones(2), np.ones(2, bool), 2.0, "verified", ALL, (ALL,))
    yield LocalBounds(np.ones(2), np.ones(2), 2.0, "verified", 0.1, notes=(ALL,))
    rows = (
        Compared(ALL, "upper", 2.0, "verified", result=upper),
        Compared("empirical", "lower", 1.0, "attained", result=lower),
        Compared(ALL, "none", reason=ALL),
    )
    yield Comparison(rows, 2.0, notes=(ALL,))
    yield _diagnosis()
    yield _checks()


def _diagnosis():
    arrays = ("eigenvalues_forged", "eigenvalues_support", "rows_forged", "columns_forged")
    fields = {field.name: 1.0 for field in dataclasses.fields(diagnostics.Layer)}
    fields |= dict.fromkeys(arrays, np.ones(2)) | {"shape": ((2,), (2,)), "path": ALL}
    fields |= {"guarantee": "verified", "exact": True, "inputs": 2}
    layer = diagnostics.Layer(**fields)
    names = {field.name for field in dataclasses.fields(diagnostics.Diagnosis)}
    given = {
        "layers": (layer, layer),
        "left_out": {ALL: ALL},
        "kind": "hard",
        "examples": 2,
        "sample": 2,
        "seed": 0,
    }
    assert names == set(given)
    return diagnostics.Diagnosis(**given)


def _checks():
    check = masking.Check(ALL, masking.FAILS, ALL, 3, ALL, {})
    return masking.MaskingChecks((check,), {"eps": 0.1, "norm": "2", "level": 0.05})


@pytest.mark.parametrize("result", list(_results()), ids=lambda result: type(result).__name__)
def test_results_show_hostile_names_as_they_are(result):
    text = repr(result)
    assert "\x1b" not in text and "\x07" not in text
    if hasattr(result, "_repr_html_"):
        page = result._repr_html_()
        shown = [name for name in HOSTILE if name.isprintable() or "pre" not in Page(page).tags]
        assert isinstance(page, Html)
        check_page(page, *shown)
        check_page(report.environment().from_string("<p>{{ page }}</p>").render(page=page), *shown)
    for name in ("to_markdown", "_repr_markdown_"):
        if hasattr(result, name):
            check_markdown(getattr(result, name)())
    if hasattr(result, "parts_table"):
        assert "\x1b" not in result.parts_table()
    if hasattr(result, "plot"):
        result.plot().figure.savefig(io.BytesIO(), format="svg")


def test_call_paths_of_a_traced_function():
    matrix = np.ones((3, 3), np.float32)

    def net(x):
        for name in HOSTILE:
            with jax.named_scope(name):
                x = jax.nn.relu(matrix @ x - 1)
        return x

    form = lb.trace(net, jax.ShapeDtypeStruct((3,), np.float32))
    page = form._repr_html_()
    check_page(page, *(name for name in HOSTILE if name.isprintable()))
    assert "\x1b" not in repr(form) + page + "".join(tap.path for tap in form.taps)
    for bound in (lb.naive(form), lb.liplt(form), lb.lipsdp(form)):
        check_page(bound._repr_html_())
        check_markdown(bound.to_markdown())

    def refused(x):
        with jax.named_scope(ALL):
            return x * x

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(refused, jax.ShapeDtypeStruct((3,), np.float32))
    assert "\x1b" not in str(caught.value) and HOSTILE[0] in str(caught.value)


@pytest.mark.slow
def test_names_in_an_onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from lipbounds.interop import load_onnx

    def write(operator, file):
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (4, 2))]
        names = [f"{HOSTILE[0]} {k}" for k in range(2)]
        nodes = [
            helper.make_node("MatMul", ["x", names[0]], [HOSTILE[1]], name=HOSTILE[2]),
            helper.make_node(operator, [HOSTILE[1]], [HOSTILE[3]], name=ALL),
            helper.make_node("MatMul", [HOSTILE[3], names[1]], ["y"], name=HOSTILE[8]),
        ]
        graph = helper.make_graph(
            nodes,
            ALL,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
            [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, tmp_path / file)
        return tmp_path / file

    path = write("Relu", "net.onnx")
    fn, spec = load_onnx(path)
    form = lb.trace(fn, spec)
    page = form._repr_html_()
    check_page(page, HOSTILE[0], HOSTILE[1])
    assert "\x1b" not in repr(form) + page
    for bound in (lb.naive(form), lb.liplt(form), lb.lipsdp(form)):
        check_page(bound._repr_html_())
        check_markdown(bound.to_markdown())
    shown = CliRunner().invoke(app, ["bounds", str(path), "--method", "all"])
    assert shown.exit_code == 0 and "\x1b]" not in shown.output and "\x07" not in shown.output
    refused = CliRunner().invoke(app, ["bounds", str(write("Round", "bad.onnx"))])
    assert refused.exit_code == 1 and HOSTILE[0] in refused.output
    assert "\x1b" not in refused.output and "\x07" not in refused.output


def test_names_of_registered_functions():
    name = "[red]<script>alert(1)</script>\x1b[2J"

    @jax.jit
    def inner(x):
        return jax.nn.tanh(x)

    def outer(x):
        return inner(x)

    inner.__name__ = outer.__name__ = name
    form = lb.trace(outer, jax.ShapeDtypeStruct((3,), np.float32))
    tap = dataclasses.replace(form.taps[0], name=name)
    form = dataclasses.replace(form, program=dataclasses.replace(form.program, steps=(tap,)))
    assert "\x1b" not in repr(form)
    check_page(form._repr_html_(), name)


# ----------------------------------------------------------------------------------------------------- pages
def _curve():
    return {
        "eps": [0.0, 1.0],
        "accuracy": [1.0, 0.0],
        "images": 2,
        "quartiles": [0.1, 0.2, 0.3],
        "guarantee": "verified",
    }


def _demo():
    row = {
        "label": ALL,
        "norm": "2",
        "value": 2.0,
        "guarantee": "verified",
        "seconds": 1.0,
        "certified": _curve(),
    }
    part = {"source": ALL, "target": ALL, "shape": [2, 3], "value": 1.0, "guarantee": "verified", "how": ALL}
    pairs = {"worst": [0, 1], "worst_value": 1.0, "average": 1.0, "average_sum": 2.0}
    upper = [row | {"parts": [part], "notes": [ALL], "pairs": pairs}]
    training = {"epochs": 1, "seconds": 1.0, "train_accuracy": 1.0, "test_accuracy": 1.0}
    model = {
        "name": "net",
        "title": ALL,
        "file": ALL,
        "parameters": 3,
        "taps": 1,
        "architecture": ALL,
        "arguments": {},
        "upper": upper,
        "estimate": [{"label": ALL, "norm": "2", "value": 1.5, "guarantee": "estimate", "seconds": 1.0}],
        "lower": [{"label": ALL, "norm": "2", "value": 1.0, "seconds": 1.0}],
        "refused": [{"label": ALL, "norm": "1", "reason": ALL}],
    }
    models = [
        model | {"training": training | {"with": "cross-entropy"}},
        model | {"name": "other", "training": training | {"with": "crm"}},
    ]
    program = dict.fromkeys(("lipbounds", "jax", "python", "numpy", "device"), ALL)
    about = {"command": ALL, "created": ALL, "unit": ALL, "seconds": 2.0, "program": program}
    return about | {"data": {"name": ALL, "train": 2, "test": 2}, "models": models}


def _evaluation():
    constants = {"average_pair": 1.0, "average_sum": 2.0, "average_sqrt2": 3.0}
    record = {
        "model": {"title": ALL, "dataset": ALL},
        "unit": ALL,
        "command": ALL,
        "created": ALL,
        "lipbounds": ALL,
        "seed": 0,
        "images": 2,
        "eps": [0.1],
        "clean": 1.0,
        "pgd": {"2": {"0.1": 0.5}},
        "pgd_settings": {"steps": 1, "restarts": 1},
        "certified": {ALL: {"0.1": 0.4}},
        "guarantee": {ALL: "verified"},
        "attacked": {
            "by": ["PGD", "AutoAttack"],
            "2": {"0.1": 0.5},
            "curve": {"eps": [0.0, 0.1], "accuracy": [1.0, 0.5]},
        },
        "robust": {"0.1": {"certified": 0.4, "by": ALL, "attacked": 0.5}},
        "inside": {"images": 2, "broken": 0},
        "rounding": 0,
        "refused": {ALL: ALL},
        "notes": {ALL: []},
        "radii": {ALL: _curve()},
        "constants": {ALL: constants},
        "seconds": {ALL: 0.1},
        "paper_units": {"text": ALL, "given": {"0.1": 0.2}},
    }
    return record | {"against": dict(record)}


def _forging():
    diagnosis, checks = _diagnosis(), _checks()
    row = forging_study.Row(0.5, np.ones(2, bool), np.ones(2, bool), 0.5, diagnosis)
    settings = {"kind": "hard", "images": 2, "eps": 0.1, "norm": "2", "steps": 1, "queries": 1, "seed": 0}
    forged = type("Forged", (), {"sites": (1,)})()
    study = forging_study.Study((row,), forged, settings | {"layers": [ALL]})
    claim = forging_study.Claim(ALL, ALL, ALL)
    record = forging_report.forging_record(study, 0.5, ALL, [claim], checks)
    about = dict.fromkeys(("command", "created", "lipbounds"), ALL)
    return record | about | {"model": {"title": ALL, "dataset": ALL}}, study, checks


def _written(write, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        return write(tmp_path).read_text(encoding="utf-8")


def test_the_page_of_the_demo(tmp_path):
    page = _written(lambda folder: report.write_report(_demo(), folder), tmp_path)
    check_page(page, *HOSTILE)


def test_the_page_of_an_evaluation(tmp_path):
    page = _written(lambda folder: evaluation_report.write_evaluation_report(_evaluation(), folder), tmp_path)
    check_page(page, *HOSTILE)
    picture = (tmp_path / "radii.svg").read_text(encoding="utf-8")
    assert Page(picture).tags.isdisjoint({"script", "img"})


def test_the_page_of_forging(tmp_path):
    record, study, checks = _forging()
    page = _written(
        lambda folder: forging_report.write_forging_report(record, study, checks, folder), tmp_path
    )
    check_page(page, *HOSTILE)
    assert "&lt;table" not in page and "<table" in page
    check_page(study._repr_html_())
    check_markdown(study._repr_markdown_())


def test_the_page_of_a_training_run(tmp_path):
    config = dataclasses.replace(Config(dataset="digits", arch="64-8-10"))
    hostile = {"dataset": ALL, "arch": ALL, "seed": 0, "data_dir": None, ALL: ALL, "eps": 0.1}
    shown = type(
        "Shown",
        (),
        {
            "to_json": lambda self: hostile,
            **{"arch": ALL, "dataset": ALL, "attack_norm": ALL},
            **{"eps": config.eps, "attack_eps": config.eps, "robust": False},
        },
    )()
    log = [{"epoch": 1, "loss": 1.0, "accuracy": 0.5, "skipped": 0, "failed": 0, "seconds": 1.0}]
    final = {
        "images": 2,
        "clean": 1.0,
        "certified": 0.5,
        "eps": 0.1,
        "method": ALL,
        "guarantee": ALL,
        "seconds": 1.0,
    }
    final |= {"constant": 1.0, "average_pair": 1.0}
    page = _written(lambda folder: training_report.write_training_report(folder, shown, log, final), tmp_path)
    check_page(page, *HOSTILE)


def test_a_page_holds_names_that_are_not_unicode(tmp_path):
    report.write_page(tmp_path / "a.html", "<p>model-\udcff</p>")
    assert (tmp_path / "a.html").read_bytes() == b"<p>model-&#56575;</p>"


# ----------------------------------------------------------------------------------------------------- text
def test_tables_and_lines_of_text():
    rows = [[name, name] for name in HOSTILE]
    lines = text_table((ALL, "b"), rows).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.isprintable() for line in lines)
    assert printable("a\tb\x1b\x9b\u2028") == r"a\tb\x1b\x9b\u2028" and printable("ä → λ") == "ä → λ"
    table = markdown_table((ALL, "b"), rows)
    assert len(table.splitlines()) == 2 + len(rows)
    check_markdown(table)
    check_markdown(markdown_text(ALL))
    assert markdown_text("L <= 3 & a < b, tanh[8]") == "L <= 3 & a < b, tanh[8]"
    check_page(html_table((ALL, ALL), rows), *HOSTILE)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_markup_as_text(terminal):
    name = "[red]bold[/] [/] [/nothing] :warning: [link=x]"
    console = Console(file=io.StringIO(), force_terminal=terminal, width=400, color_system=None)
    record = _evaluation() | {"model": {"title": name, "dataset": name}, "certified": {}}
    model = _demo()["models"][0] | {"title": name}
    model["upper"][0]["label"] = name
    console.print(evaluate.accuracy_table(record))
    console.print(evaluate.constants_table(record | {"constants": {}}))
    console.print(tables.results_table(model, tables.model_title(model)))
    tables.say(console, name)
    with tables.progress(console) as tell:
        tell(name, 0.5)
    count = 6 if terminal else 5  # elsewhere progress is said on stderr
    assert "".join(console.file.getvalue().split()).count("".join(name.split())) >= count


def test_paths_with_markup_on_the_command_line(tmp_path):
    for name in ("[/red].safetensors", "[/].onnx", "[bold]"):
        result = CliRunner().invoke(app, ["bounds", str(tmp_path / name)])
        assert result.exit_code != 0 and not isinstance(result.exception, Exception), name


def test_formulas_in_labels_are_text():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        for figure in (
            figures.bounds_figure(_demo()["models"][0]),
            figures.contrast_figure(report.contrast(_demo())),
        ):
            assert figures.png(figure).startswith(b"\x89PNG")
