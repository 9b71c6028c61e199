"""A matrix with an error is not usable as a matrix: the type, and a walk over the source."""

import ast
import pathlib

import numpy as np
import pytest
import scipy.sparse as sp

import lipbounds
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure

SOURCE = pathlib.Path(lipbounds.__file__).parent
#: Where M may be read without its error, as nothing is proved from it: (file, function), with what comes of it.
SEARCHES = {
    ("dense_form.py", "reduce_input"),  # the problem whose multipliers are searched
    ("dense_form.py", "_sizes"),  # units of neurons, sound whatever they are
    ("state_matrices.py", "_units_of"),  # the same
    ("dense_search.py", "_moderate"),  # whether the dense form is tried
    ("search.py", "parameters_from"),  # a start of the optimiser, which finds D
    ("search.py", "_Ellipsoids.__init__"),  # the first state of the optimiser
    ("proof.py", "_raised_dense"),  # a D that propagate_dense proves
    ("wide_search.py", "Search.__init__"),  # the maps of the search, whose multipliers are proved afterwards
    ("scaling.py", "factors"),  # factors, sound whatever they are; exactly zero ones only without an error
    ("scaling.py", "optimize"),  # factors, sound whatever they are
    ("wide_blocks.py", "_root"),  # R, of which R R' is compared with the matrix
    ("wide_blocks.py", "product_norm"),  # the estimate beside the bound
    ("ellipsoid.py", "problem"),  # the optimiser's problem
    ("stages.py", "_effects"),  # units in which multipliers are searched, sound whatever they are
}


def test_an_enclosure_is_no_array():
    m, a = Enclosure(np.eye(3), 0.5), np.eye(3)
    for wrong in (
        lambda: np.asarray(m),
        lambda: a @ m,
        lambda: a + m,
        lambda: np.abs(m),
        lambda: m @ a,
        lambda: m * 2,
    ):
        with pytest.raises(TypeError):
            wrong()
    assert not hasattr(m, "matrix") and m.exact_or_none() is None
    assert Enclosure(a).exact_or_none() is not None


@pytest.mark.parametrize("make", [np.asarray, sp.csr_array])
def test_what_is_true_of_every_member(make):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, 4)) * (rng.uniform(size=(5, 4)) < 0.6)
    a[2], a[:, 1] = 0, 0
    exact, blurred = Enclosure(make(a)), Enclosure(make(a), 0.3)
    assert np.array_equal(exact.support(axis=0), a.any(axis=0))
    assert np.array_equal(exact.support(axis=1), a.any(axis=1))
    assert blurred.support(axis=0).all() and blurred.support(axis=1).all()
    rows, cols = np.array([0, 0, 3, 0]), np.array([3, 3])
    picked = blurred.select(rows, cols)
    e = np.zeros((5, 4))
    e[0, 3] = 0.3
    change = (a + e)[rows][:, cols] - picked.dense().midpoint_for_search()
    assert np.linalg.norm(change) <= picked.error <= 0.3 * np.sqrt(6) * (1 + 1e-12)
    assert blurred.select(rows=slice(1, 3)).error == 0.3 and exact.select(rows).error == 0.0
    assert blurred.select(cols=np.array([True, False, True, False])).shape == (5, 2)
    for q in (1, 2, np.inf):
        for _ in range(50):
            e = rng.standard_normal(a.shape) * (rng.uniform(size=a.shape) < 0.3)
            member = a + 0.3 * e / max(np.linalg.norm(e), 1e-9)
            sizes = np.linalg.norm(member, q, axis=1)
            assert (sizes <= enclosures.enclosure_row_norms(blurred, q) * (1 + 1e-12)).all()
            pairs = np.linalg.norm(member[:, None] - member[None], q, axis=2)
            assert (pairs <= enclosures.enclosure_pair_norms(blurred, q) * (1 + 1e-12)).all()
    assert enclosures.enclosure_cheap_norm(blurred) >= np.linalg.norm(a, 2) + 0.3


def functions(tree, name=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            full = f"{name}.{node.name}" if name else node.name
            if isinstance(node, ast.FunctionDef):
                yield full, node
            else:
                yield from functions(node, full)


def called(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def misuses(name, text):
    """What of one file breaks the rules: (function, why)."""
    tree, found = ast.parse(text), []
    inside = {id(n): full for full, f in functions(tree) for n in ast.walk(f)}
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        where = inside.get(id(node), "module")
        if isinstance(node, ast.Attribute) and node.attr == "_midpoint" and name != "enclosures.py":
            found.append((where, "reads the midpoint itself"))
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "midpoint_for_search"
            and (name, where) not in SEARCHES
        ):
            found.append((where, "searches where something may be proved"))
        if not called(node, "with_error"):
            continue
        parent = parents[id(node)]
        if isinstance(parent, ast.Starred) and isinstance(parents[id(parent)], ast.Call):
            continue  # both are handed on
        while not isinstance(parent, ast.Assign | ast.stmt):
            if isinstance(parent, ast.Subscript | ast.Attribute | ast.Call):
                break
            parent = parents[id(parent)]
        body = next((f for full, f in functions(tree) if full == where), None)
        pairs = [t for t in ast.walk(parent) if isinstance(t, ast.Tuple) and isinstance(t.ctx, ast.Store)]
        pairs = [t.elts for t in pairs if len(t.elts) == 2 and all(isinstance(e, ast.Name) for e in t.elts)]
        read = {
            n.id for n in ast.walk(body or tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        if not isinstance(parent, ast.Assign) or not pairs or any(p[1].id not in read for p in pairs):
            found.append((where, "takes the matrix and drops its error"))
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_error_is_dropped(path):
    assert not misuses(path.name, path.read_text())


def test_the_walk_sees_what_it_should():
    bad = {
        "def f(m): return m._midpoint": "reads",
        "def f(m): return abs(m.midpoint_for_search())": "searches",
        "def f(m): return m.with_error()[0]": "drops",
        "def f(m):\n    a, _ = m.with_error()\n    return a": "drops",
        "def f(m, n):\n    (a, e), (b, g) = m.with_error(), n.with_error()\n    return a, b, e": "drops",
        "def f(m): return g(m.with_error())": "drops",
    }
    for text, why in bad.items():
        ((where, said),) = {(w, s) for w, s in misuses("any.py", text)}
        assert where == "f" and why in said
    fine = "def f(m):\n    a, e = m.with_error()\n    return g(a, *m.with_error()) + e"
    assert not misuses("any.py", fine)
