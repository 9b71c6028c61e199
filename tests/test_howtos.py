"""The how-tos of CONTRIBUTING: an activation, a rule and a bound, added to a copy of the package as they say."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

#: (how-to, file below lipbounds/, what the row is put behind, the row). Nothing else is changed.
ROWS = (
    ("activation", "_tracing/rules.py", 'ELEMENTWISE = frozenset(\n    """', "gudermann "),
    ("activation", "_tracing/parameters.py", '_PLAIN = """', "gudermann "),
    ("activation", "_activations/activations.py", "_LAX: dict[str, Callable[..., Any]] = {\n",
     '    "gudermann": lambda x: lax.atan(lax.sinh(x)),\n'),
    ("activation", "_activations/terms.py", 'UNARY = frozenset(\n    "', "gudermann "),
    ("activation", "_activations/intervals.py", "VALUE: dict[str, Fn] = {\n",
     '    "gudermann": lambda u: _signed(np.arctan, _signed(np.sinh, u)),\n'),
    ("activation", "_activations/intervals.py", "FIRST: dict[str, Fn] = {\n",
     '    "gudermann": lambda u: _inv(cosh(u)),\n'),
    ("rule", "_tracing/rules.py", "RULES: dict[str, Rule] = {\n",
     '    "differences": _unary("differences", lambda p, e: {}),\n'),
    ("rule", "_tracing/parameters.py", "PARAMETERS: dict[str, dict[str, Allowed]] = {\n",
     '    "differences": {},\n'),
    ("rule", "_form/steps.py", "KINDS: dict[str, Kind] = {\n",
     '    "differences": Kind(lambda p, a: a - jnp.roll(a, -1)),\n'),
    ("bound", "_comparison/compare.py", "METHODS: dict[str, Callable[[Question], Any]] = {\n",
     '    "twice-naive": lambda q: twice_naive(q.form, **q.options()),\n'),
    ("bound", "_comparison/compare.py", "from lipbounds._triangle.naive import naive\n",
     "from lipbounds._triangle.twice_naive import twice_naive\n"),
)  # fmt: skip

BOUND = '''
"""Twice the naive bound."""

import dataclasses

from lipbounds._text.calls import public
from lipbounds._triangle.naive import naive


@public
def twice_naive(form, *, norm=2, pairwise=False, guarantee="auto", seed=0, progress=True):
    found = naive(form, norm=norm, guarantee=guarantee, seed=seed)
    return dataclasses.replace(found, value=2 * found.value, method="twice-naive")
'''

TRIED = """
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

import lipbounds as lb


def primitive(name, fn):
    made = Primitive(name)
    made.def_abstract_eval(lambda x: x)
    made.def_impl(fn)
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=False))
    return made.bind


def attempt(what):
    try:
        return what()
    except ValueError as error:
        return str(error)


weights = np.float32([[1, 2, -1, 0], [0, 1, 3, -2], [2, 0, 0, 1]])
spec = jax.ShapeDtypeStruct((4,), jnp.float32)
gudermann = primitive("gudermann", lambda x: jnp.arctan(jnp.sinh(x)))
differences = primitive("differences", lambda x: x - jnp.roll(x, -1))
known = lb.naive(lb.from_weights([weights @ (np.eye(4) - np.eye(4)[[1, 2, 3, 0]]).astype(np.float32)])).value


def activation():
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    return lb.naive(lb.trace(gudermann, one)).value, lb.liplt(lb.trace(lambda x: gudermann(x) - x / 2, one)).value


def rule():
    return lb.naive(lb.trace(lambda x: weights @ differences(x), spec)).value / known


def bound():
    form = lb.from_weights([weights, weights.T])
    rows = lb.compare(form, methods=["naive", "twice-naive"])
    return rows["twice-naive"].value / rows["naive"].value, "twice-naive" in lb.METHODS


found = {what.__name__: attempt(what) for what in (activation, rule, bound)}
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """What `TRIED` finds with the additions, in a process of its own."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lipbounds", folder / "lipbounds", ignore=ignore)
    for _, name, anchor, row in ROWS:
        path = folder / "lipbounds" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(anchor) == 1, (name, anchor)
        path.write_text(text.replace(anchor, anchor + row), encoding="utf-8")
    (folder / "lipbounds" / "_triangle" / "twice_naive.py").write_text(BOUND, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{TRIED}\nprint(lb.__file__, json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    place, _, found = done.stdout.partition(" ")
    assert place.startswith(str(folder))
    return json.loads(found)


@pytest.fixture(scope="module")
def before():
    """What `TRIED` finds without them."""
    names = {}
    exec(TRIED, names)
    return names["found"]


def section(howto):
    """The text of "## Add a ..."."""
    return re.search(rf"^## Add an? {howto}$(.*?)^## ", GUIDE, re.MULTILINE | re.DOTALL)[1]


def test_an_activation(added, before):
    largest, centred = added["activation"]
    assert 1 <= largest <= 1 + 1e-6 and 0.5 <= centred <= 0.5 + 1e-6  # the slopes of gudermann fill (0, 1]
    assert "gudermann" in before["activation"] and "no rule for this primitive" in before["activation"]


def test_a_rule(added, before):
    assert added["rule"] == pytest.approx(1, rel=1e-9)
    assert "differences" in before["rule"] and "no rule for this primitive" in before["rule"]


def test_a_bound(added, before):
    assert added["bound"] == [2.0, True]
    assert before["bound"].startswith("unknown methods ['twice-naive']")


@pytest.mark.parametrize(("howto", "file", "anchor"), [row[:3] for row in ROWS if "import" not in row[2]])
def test_the_guide_names_every_place(howto, file, anchor):
    table = re.match(r"\w+", anchor)[0]
    assert f"`{table}`" in section(howto) and f"`{file}`" in section(howto)


def test_every_file_that_the_guide_names_exists():
    names = set(re.findall(r"`([\w./]+\.(?:py|toml|md|sh))`", GUIDE))
    folders = [ROOT, ROOT / "lipbounds", *(p for p in (ROOT / "lipbounds").iterdir() if p.is_dir())]
    folders += [ROOT / "analysis", ROOT / "training"]
    assert len(names) > 20
    assert not [name for name in names if not any((folder / name).is_file() for folder in folders)]
