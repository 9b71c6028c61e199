"""Lower bounds, brackets and the table of all methods."""

import dataclasses
import itertools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds import compare as compare_function
from lipbounds._comparison import compare as table
from lipbounds._comparison.bracket import Bracket, check_order
from lipbounds.errors import GuaranteeError, Unsupported, UnsupportedError
from lipbounds.results import Estimate, LowerBound, UpperBound

NORMS = [1, 2, math.inf]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """W_n phi(... phi(W_1 x + b_1))."""

    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    in_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    num_outputs: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(default="relu", metadata={"static": True})

    def evaluate(self, x, dtype=None):
        x = jnp.asarray(x, dtype).reshape(-1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                x = {"relu": lambda v: jnp.maximum(v, 0), "tanh": jnp.tanh}[self.kind](x)
            x = w.astype(x.dtype) @ x + b.astype(x.dtype)
        return x


def chain(*widths, seed=0, kind="relu", shape=None, offset=0.3):
    rng = np.random.default_rng(seed)
    w = tuple(
        jnp.asarray(rng.standard_normal((b, a)) / np.sqrt(a), jnp.float32)
        for a, b in itertools.pairwise(widths)
    )
    c = tuple(jnp.asarray(offset * rng.standard_normal(b), jnp.float32) for b in widths[1:])
    return Chain(w, c, shape or (widths[0],), widths[-1], kind)


def traced(form):
    """The Lur'e form of a Chain; any other form as it is."""
    if not isinstance(form, Chain):
        return form
    return lb.trace(form.evaluate, jax.ShapeDtypeStruct(form.in_shape, jnp.float32))


def empirical(form, *args, **options):
    return lb.empirical(traced(form), *args, **options)


def bracket(form, *args, **options):
    return lb.bracket(traced(form), *args, **options)


def numpy_chain(form, x):
    """An evaluation of a Chain that shares no code with it."""
    v = np.asarray(x, np.float64).ravel()
    for i, (w, b) in enumerate(zip(form.weights, form.biases, strict=True)):
        if i:
            v = np.where(v > 0, v, 0.0) if form.kind == "relu" else np.tanh(v)
        v = np.asarray(w, np.float64) @ v + np.asarray(b, np.float64)
    return v


# ---------------------------------------------------------------------------------------------- empirical
@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", NORMS)
def test_linear_maps_are_found_exactly(norm):
    form = chain(4, 3)
    W = np.asarray(form.weights[0], np.float64)
    found = empirical(form, norm=norm, pairwise=True)
    exact = np.linalg.norm(W, norm)
    assert exact * (1 - 1e-8) <= found.value <= exact
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    pairs = np.linalg.norm(W[:, None] - W[None], dual, axis=-1)
    assert np.all(found.pairwise <= pairs) and np.all(found.pairwise >= pairs * (1 - 1e-8))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("norm", "kind"), [(1, "relu"), (2, "relu"), (math.inf, "relu"), (2, "tanh")])
def test_the_witness_shows_the_value(norm, kind):
    form = chain(2, 8, 6, 3) if kind == "relu" else chain(6, 12, 4, kind=kind, shape=(2, 3))
    found = empirical(form, norm=norm)
    x, y = found.witness
    assert x.shape == y.shape == form.in_shape
    slope = np.linalg.norm(numpy_chain(form, x) - numpy_chain(form, y), norm) / np.linalg.norm(
        (x - y).ravel(), norm
    )
    assert found.value <= slope <= found.value * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
def test_the_climb_finds_more_than_its_starts_and_reaches_a_known_optimum(norm):
    form = chain(2, 8, 6, 3)
    grid = np.stack(np.meshgrid(*[np.linspace(-12, 12, 400)] * 2), -1).reshape(-1, 2)
    w, b = ([np.asarray(a, np.float64) for a in leaves] for leaves in (form.weights, form.biases))
    first = grid @ w[0].T + b[0]
    second = np.maximum(first, 0) @ w[1].T + b[1]
    jacobians = np.einsum("ab,nb,bc,nc,cd->nad", w[2], second > 0, w[1], first > 0, w[0], optimize=True)
    best = np.linalg.norm(jacobians, norm, axis=(1, 2)).max()
    still, climbed = empirical(form, norm=norm, steps=0), empirical(form, norm=norm)
    assert still.value <= climbed.value * (1 + 1e-9)
    assert climbed.value >= 0.98 * best


def test_the_climb_leaves_its_starts():
    far = np.full((3, 2), 2.0, np.float32)  # all starts at one place that is not the steepest
    still = empirical(chain(2, 8, 6, 3), far, steps=0)
    assert still.value < 0.9 * empirical(chain(2, 8, 6, 3), far).value


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", NORMS)
def test_pairs_are_attained_and_no_larger_than_the_whole_allows(norm):
    form = chain(2, 8, 6, 3)
    found = empirical(form, norm=norm, pairwise=True)
    assert np.array_equal(found.pairwise, found.pairwise.T) and not np.diagonal(found.pairwise).any()
    assert (found.pairwise[np.triu_indices(3, 1)] > 0).all()
    x, y = found.witness
    change = numpy_chain(form, x) - numpy_chain(form, y)
    at_witness = np.abs(change[:, None] - change[None]) / np.linalg.norm(x - y, norm)
    assert np.all(found.pairwise >= at_witness * (1 - 1e-6) - 1e-9)
    w1, w2, w3 = (np.asarray(w, np.float64) for w in form.weights)
    dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
    # L_ij bounded by hand
    rows = np.abs(w3[:, None] - w3[None]) @ np.abs(w2) @ np.linalg.norm(w1, dual, axis=1)
    assert np.all(found.pairwise <= rows + 1e-12)


@pytest.mark.slow
def test_many_classes():
    form = chain(6, 20, 40)
    found = empirical(form, pairwise=True, steps=5)
    assert found.pairwise.shape == (40, 40) and (found.pairwise[np.triu_indices(40, 1)] > 0).all()


def test_same_seed_same_answer_and_any_seed_a_lower_bound():
    form = chain(2, 8, 6, 3)
    assert empirical(form, seed=3).value == empirical(form, seed=3).value
    product = np.prod([np.linalg.norm(np.asarray(w, np.float64), 2) for w in form.weights])
    values = [empirical(form, seed=s).value for s in range(8)]
    assert max(values) <= product and min(values) > 0


def test_constant_function():
    form = chain(4, 3)
    flat = dataclasses.replace(form, weights=(jnp.zeros((3, 4), jnp.float32),))
    found = empirical(flat, pairwise=True)
    assert found.value == 0.0 and not found.pairwise.any() and found.notes


def test_large_outputs_do_not_make_slopes_out_of_rounding():
    form = chain(4, 3)
    shifted = dataclasses.replace(form, biases=(jnp.asarray([1e6, -3e7, 1e9], jnp.float32),))
    exact = np.linalg.norm(np.asarray(form.weights[0], np.float64), 2)
    assert 0.99 * exact < empirical(shifted).value <= exact


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_inputs_in_other_units(scale):
    form = chain(2, 8, 6, 3)
    X = np.random.default_rng(1).standard_normal((40, 2))
    other = dataclasses.replace(form, weights=(form.weights[0] / jnp.float32(scale), *form.weights[1:]))
    assert empirical(other, X * scale).value * scale == pytest.approx(empirical(form, X).value, rel=0.1)


@pytest.mark.parametrize(
    ("X", "why"),
    [
        (np.zeros((0, 4)), "no points"),
        (np.zeros(4), r"shape \(N, 4\)"),
        (np.zeros((3, 5)), r"shape \(N, 4\)"),
        (np.full((2, 4), np.nan), "not finite"),
        (np.full((2, 4), 1e300), "not finite"),
        (np.array([["a"] * 4]), "real numbers"),
        (np.zeros((2, 4), complex), "real numbers"),
    ],
)
def test_bad_points(X, why):
    with pytest.raises(ValueError, match=why):
        empirical(chain(4, 3), X)


def test_bad_options():
    with pytest.raises(ValueError, match="norm must be"):
        empirical(chain(4, 3), norm=3)
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="steps"):
            empirical(chain(4, 3), steps=steps)


def test_refuses_tracers():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda form: empirical(form).value)(chain(4, 3))


@pytest.mark.slow
def test_second_network_of_the_same_shape_compiles_nothing(caplog):
    X = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    forms = [traced(chain(5, width, 3, seed=seed)) for width, seed in ((11, 1), (11, 2), (13, 2))]
    empirical(forms[0], X, pairwise=True)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        empirical(forms[1], X + 1, pairwise=True)
        again = [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
        empirical(forms[2], X, pairwise=True)
        fresh = [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
    assert not again and fresh


# ---------------------------------------------------------------------------------------- order and brackets
def upper(value, norm=2, guarantee="verified", **more):
    return UpperBound(value, norm, guarantee, "naive", 0.1, **more)


def lower(value, norm=2, **more):
    return LowerBound(value, norm, "empirical", 0.1, **more)


def test_ratio():
    assert Bracket(lower(2.0), upper(3.0)).ratio == 1.5
    assert Bracket(lower(0.0), upper(0.0)).ratio == 1.0 and Bracket(lower(0.0), upper(1.0)).ratio == math.inf
    text = repr(Bracket(lower(2.0), upper(3.0)))
    assert "2 <= L <= 3" in text and "1.5" in text and "verified" in text
    assert Bracket(lower(2.0), upper(3.0)).plot().patches[0].get_width() == 1.0


def test_crossing_bounds_are_an_error():
    with pytest.raises(GuaranteeError, match="bug of lipbounds"):
        Bracket(lower(2.0), upper(1.9))
    with pytest.raises(GuaranteeError, match="registered activation"):
        Bracket(lower(2.0), upper(1.9, guarantee="assumed"))
    pairs = np.array([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(GuaranteeError, match="L_0,1"):
        check_order(lower(0.5, pairwise=pairs), upper(3.0, pairwise=pairs / 2))
    check_order(lower(3.0, pairwise=pairs), upper(3.0, pairwise=pairs))
    with pytest.raises(ValueError, match="3 and 2 outputs"):
        check_order(lower(0.5, pairwise=np.zeros((3, 3))), upper(3.0, pairwise=pairs))


def test_brackets_do_not_mix():
    with pytest.raises(ValueError, match="l2 and an upper bound in l1"):
        Bracket(lower(1.0), upper(2.0, norm=1))
    with pytest.raises(TypeError, match="UpperBound"):
        Bracket(lower(1.0), Estimate(2.0, 2, method="naive"))
    with pytest.raises(TypeError, match="UpperBound"):
        bracket(chain(4, 3), upper=Estimate(2.0, 2, method="naive"))
    with pytest.raises(ValueError, match="estimate"):
        bracket(chain(4, 3), guarantee="estimate")


def test_results_of_another_network_are_refused():
    form, other = lb.from_weights([np.eye(2)]), lb.from_weights([3 * np.eye(2)])
    near = lb.local(form, [[1.0, 1.0]], 0.1)[0]
    for foreign, why in ((lb.liplt(other), "another network"), (near, "one example only")):
        with pytest.raises(ValueError, match=why):
            lb.compare(form, methods=[foreign])
        with pytest.raises(ValueError, match=why):
            bracket(form, upper=foreign)
    assert lb.compare(form, methods=[lb.liplt(form)]).upper.value == pytest.approx(1.0)


def test_bracket_with_a_bound_at_hand():
    form = chain(2, 8, 6, 3)
    product = float(np.prod([np.linalg.norm(np.asarray(w, np.float64), np.inf) for w in form.weights]))
    b = bracket(form, upper=upper(product, norm=math.inf))
    assert b.lower.norm == math.inf and 0 < b.lower.value <= b.upper.value == product


def real(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    widths = (6, 12, 8, 4)
    return lb.from_weights(
        [(rng.standard_normal((b, a)) / np.sqrt(a)).astype(dtype) for a, b in itertools.pairwise(widths)]
    )


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", NORMS)
def test_bracket_of_a_traced_network(norm):
    b = lb.bracket(real(), norm=norm, pairwise=True)
    assert 0 < b.lower.value <= b.upper.value and 1 <= b.ratio < 10
    assert np.all(b.lower.pairwise <= b.upper.pairwise)


@pytest.mark.slow
def test_derivatives_that_lie_do_not_lower_the_lower_bound():
    @jax.custom_jvp
    def liar(x):
        return jnp.maximum(x, jnp.zeros_like(x))

    liar.defjvp(lambda primals, tangents: (liar(primals[0]), jnp.zeros_like(tangents[0])))
    W = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    honest = lb.empirical(lb.trace(lambda x: jnp.maximum(W @ x, jnp.float32(0)), jnp.zeros(4)))
    fooled = lb.empirical(lb.trace(lambda x: liar(W @ x), jnp.zeros(4)))
    assert fooled.value == pytest.approx(honest.value, rel=1e-3) and honest.value > 0.5


# ---------------------------------------------------------------------------------------------- the table
@pytest.fixture
def faked(monkeypatch):
    """Methods with known answers."""

    def refuse(q):
        raise UnsupportedError([Unsupported("sort", "Net/sort", (3,), "too wide.", "use another method")])

    def explode(q):
        raise ValueError("scaling 'aol' needs norm=2")

    fakes = {
        "empirical": lambda q: lower(1.0, q.norm),
        "good": lambda q: upper(2.0, q.norm),
        "loose": lambda q: upper(8.0, q.norm, "probabilistic", failure_probability=1e-9),
        "guess": lambda q: Estimate(1.9, q.norm, method="guess"),
        "refuses": refuse,
        "fails": explode,
    }
    monkeypatch.setattr(table, "METHODS", fakes)
    return fakes


def test_every_number_stands_in_the_column_of_its_kind(faked):
    c = table.compare(chain(4, 3))
    assert [(r.method, r.kind, r.value) for r in c] == [
        ("empirical", "lower", 1.0),
        ("good", "upper", 2.0),
        ("loose", "upper", 8.0),
        ("guess", "estimate", 1.9),
        ("refuses", "none", None),
        ("fails", "none", None),
    ]
    header, rows, _ = c._table()
    for row in rows:
        shown = dict(zip(header, row, strict=True))
        filled = [k for k in ("upper", "lower", "estimate") if shown[k]]
        assert filled == ([c[row[0]].kind] if c[row[0]].kind != "none" else [])
    assert c.upper.value == 2.0 and c.lower.value == 1.0
    assert "needs norm=2" in c["fails"].reason and "Net/sort" in c["refuses"].reason
    assert len(c) == 6 and c[1].method == "good" and c["loose"].guarantee == "probabilistic"
    with pytest.raises(KeyError, match="there are empirical"):
        c["other"]


def test_formats_of_the_table(faked):
    c = table.compare(chain(4, 3))
    for text in (repr(c), c.to_markdown(), c._repr_html_()):
        assert "needs norm=2" in text.replace("&#x27;", "'") and "probabilistic" in text and "1.9" in text
    assert "1 <= L <= 2" in repr(c) and "1 &lt;= L" in c._repr_html_()
    assert (
        all("\n" not in line for line in c.to_markdown().splitlines()) and c.to_markdown().count("\n| ") == 7
    )


def test_plot_draws_one_bar_for_every_number(faked):
    ax = table.compare(chain(4, 3)).plot()
    assert len(ax.patches) == 4 and [t.get_text() for t in ax.get_yticklabels()] == list(faked)
    ax.figure.canvas.draw()


def test_plot_without_any_number(faked):
    table.compare(chain(4, 3), methods=["fails"]).plot().figure.canvas.draw()


def test_contradicting_rows_are_an_error(faked):
    faked["wrong"] = lambda q: upper(0.5, q.norm)
    with pytest.raises(GuaranteeError):
        table.compare(chain(4, 3))


def test_methods_are_chosen_by_name_or_given(faked):
    mine = upper(1.5)
    c = table.compare(chain(4, 3), methods=["good", mine])
    assert [r.result is mine for r in c] == [False, True] and c.upper is mine
    assert table.compare(chain(4, 3), methods="good").rows[0].method == "good"
    with pytest.raises(ValueError, match="unknown methods"):
        table.compare(chain(4, 3), methods=["good", "best"])
    with pytest.raises(ValueError, match="unknown methods"):
        table.compare(chain(4, 3), methods=[2.0])
    with pytest.raises(ValueError, match="another norm"):
        table.compare(chain(4, 3), methods=[mine], norm=1)


@pytest.mark.parametrize("error", [TypeError, IndexError, AssertionError])
def test_bugs_are_not_rows(faked, error):
    def broken(q):
        raise error

    faked["broken"] = broken
    with pytest.raises(error):
        table.compare(chain(4, 3))


@pytest.mark.parametrize(
    ("X", "y", "why"),
    [
        (None, [0], "need points"),
        (np.zeros((2, 4)), [0], "2 integer labels"),
        (np.zeros((2, 4)), [0.0, 1.0], "integer labels"),
        (np.zeros((2, 4)), [0, 3], r"0\.\.2"),
        (np.zeros((2, 4)), [-1, 0], r"0\.\.2"),
        (np.zeros((2, 5)), [0, 1], r"shape \(N, 4\)"),
    ],
)
def test_bad_labels(faked, X, y, why):
    with pytest.raises(ValueError, match=why):
        table.compare(chain(4, 3), X, y)


def test_one_output_whose_sign_decides():
    form = lb.from_weights([np.float32([[2.0, 1.0]])], activation="relu")
    X = np.float32([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    found = compare_function(form, X, [1, 0, 0], methods="naive", eps=0.1)
    assert found.clean == 2 / 3 == found["naive"].certified[0]
    with pytest.raises(ValueError, match=r"labels must lie in 0..1, got 0..2"):
        compare_function(form, X, [1, 0, 2], methods="naive")


def test_bad_arguments(faked):
    with pytest.raises(ValueError, match="norm must be"):
        table.compare(chain(4, 3), norm=0)
    with pytest.raises(ValueError, match="eps must"):
        table.compare(chain(4, 3), eps=-1.0)


@pytest.mark.slow
def test_all_methods_on_a_traced_network():
    form = real()
    X = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    z = np.asarray(jax.vmap(form)(X))
    y = z.argmax(1)
    y[:6] = (y[:6] + 1) % 4  # six points that are classified wrongly
    c = compare_function(form, X, y, pairwise=True)
    assert [r.method for r in c] == list(table.METHODS)
    assert {r.method for r in c if r.kind == "none"} == {"lipsdp-clarabel", "lipsdp-scs"}  # 6 pairs
    assert c.clean == pytest.approx(0.9) and len(c.eps) == 1
    order = ["empirical", "lipsdp", "lipsdp-layer", "liplt", "naive"]
    assert order == sorted(order, key=lambda method: c[method].value)
    assert c["lipsdp"].value <= c["liplt-optimized"].value <= c["liplt"].value
    assert c.upper.value == min(r.value for r in c if r.kind == "upper")
    for row in c:
        assert bool(row.certified) == (row.kind == "upper")
        if row.certified:
            share = np.mean(np.asarray(row.radii.radius) > c.eps[0])
            assert row.certified == (pytest.approx(share),) and row.certified[0] <= c.clean
    assert c["lipsdp"].certified >= c["liplt"].certified >= c["naive"].certified
    assert 0.3 <= max(r.certified[0] for r in c if r.certified) <= 0.6
    assert len(compare_function(form, X, y, methods=["naive"], eps=[0.01, 0.1])["naive"].certified) == 2


def test_norm_1_on_a_traced_network():
    c = compare_function(real(1), norm=1)
    assert c["naive"].kind == c["liplt"].kind == "upper" and c.lower.value <= c.upper.value
    assert all(r.kind != "none" or r.reason for r in c)
    assert "in norm 1 use lb.liplt" in c["lipsdp"].reason and "norm 1" in c["lipsdp-scs"].reason


@pytest.mark.slow
def test_norm_inf_on_a_traced_network():
    rng = np.random.default_rng(1)
    form = lb.from_weights([rng.standard_normal((5, 4)), rng.standard_normal((3, 5))])
    c = compare_function(form, norm=math.inf, methods=[m for m in table.METHODS if m != "lipsdp-layer"])
    assert c.lower.value <= c["lipsdp"].value <= c["liplt"].value <= c["naive"].value
    assert "norm=2" in c["lipsdp-clarabel"].reason and "norm=2" in c["lipsdp-scs"].reason


def test_likely_mistakes_are_answered_with_the_call_that_works(rng):
    form = lb.from_weights([rng.standard_normal((3, 4))])
    X = rng.standard_normal((5, 4))
    with pytest.raises(ValueError, match=r"y\.argmax\(axis=1\)"):
        lb.compare(form, X, np.eye(3)[[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"y\.astype\(int\)"):
        lb.certified_radius(form, X, np.array([0.0, 1.0, 2.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="subtract 1"):
        lb.certified_radius(form, X, np.array([1, 2, 3, 1, 2]))
    with pytest.raises(TypeError, match="options such as norm are keywords"):
        lb.compare(form, X, np.array([0, 1, 2, 0, 1]), 2)
