"""The triangle recursion: blocks against exact rationals, all ReLU patterns, partitions, scalings, cores."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import exceeds, fractions, product
from gain import dense_gain, form_of
from zoo_core import gauss

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._gain import blocks as linmap
from lipbounds._gain import wide_blocks
from lipbounds._gain.blocks import HostForm, Node
from lipbounds._gain.products import BlockProduct
from lipbounds._norms import enclosures
from lipbounds._norms import matrices as norms
from lipbounds._text.progress import reporting
from lipbounds._triangle import recursion as _triangle
from lipbounds._triangle import scaling as _scaling
from lipbounds._triangle.recursion import Request

NORMS = (2, 1, math.inf)
Exact = list[list[Fraction]]


def transposed(a: Exact) -> Exact:
    return [list(column) for column in zip(*a, strict=True)]


def times(factor: Fraction, a: Exact) -> Exact:
    return [[factor * x for x in row] for row in a]


# ------------------------------------------------------------------------- composite blocks, exact rationals
def chain_blocks(weights: list[np.ndarray], c: Fraction, r: Fraction) -> dict[tuple[str, str], Exact]:
    """The blocks of a chain with slopes c +- r, exactly: W_k c W_{k-1} c ... W_{j+1} r."""
    exact = [fractions(w) for w in weights]
    blocks = {}
    for j, k in itertools.combinations(range(-1, len(weights)), 2):
        block = exact[j + 1]
        for w in exact[j + 2 : k + 1]:
            block = product(w, times(c, block))
        source = "input" if j < 0 else f"relu[{j}]"
        target = "output" if k == len(weights) - 1 else f"relu[{k}]"
        blocks[source, target] = times(Fraction(1) if j < 0 else r, block)
    return blocks


def relu_chain(rng: np.random.Generator, widths: tuple[int, ...], kind: str) -> list[np.ndarray]:
    sizes = list(itertools.pairwise(widths))
    if kind == "dyadic":
        return [rng.integers(-8, 9, (b, a)) / 8.0 for a, b in sizes]
    if kind == "gauss":
        return [rng.normal(size=(b, a)) for a, b in sizes]
    if kind == "scales":  # layers of very different size
        return [rng.normal(size=(b, a)) * 2.0 ** rng.integers(-200, 200) for a, b in sizes]
    # every product of two neighbours is zero up to rounding: what floating point makes of it is all error
    first = rng.normal(size=(widths[1], widths[0]))
    weights = [first]
    for b in widths[2:]:
        null = np.linalg.svd(weights[-1].T)[2][-1:]
        weights.append(rng.normal(size=(b, 1)) @ null)
    return weights


CHAINS = [((3, 4, 3, 2), 4), ((2, 3, 3, 3, 3, 2), 3), ((4, 5, 4), 4), ((1, 3, 1), 3)]


def check_chain(weights: list[np.ndarray]) -> tuple[int, int]:
    """(blocks seen, blocks whose value is below the exact norm) of naive and LipLT on the chain."""
    form = lb.from_weights(weights, activation="relu")
    seen = below = 0
    for bound, c, r in ((lb.naive(form), 0, 1), (lb.liplt(form), Fraction(1, 2), Fraction(1, 2))):
        exact = chain_blocks(weights, Fraction(c), Fraction(r))
        recursion = _triangle.triangle(form, Request(), pairwise=False, centred=bool(c))
        for part in recursion.parts:
            block = exact[part.source, part.target]
            assert part.shape == (len(block), len(block[0])) and part.guarantee == "verified"
            seen += 1
            if any(map(any, block)) and not exceeds(Fraction(part.value), block):
                below += 1
        assert bound.guarantee == "verified" and bound.value <= recursion.value
    return seen, below


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["dyadic", "gauss", "scales", "cancelling"])
def test_composite_blocks_are_above_the_exact_norm(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    total = 0
    for widths, count in CHAINS:
        for _ in range(count):
            seen, below = check_chain(relu_chain(rng, widths, kind))
            assert not below
            total += seen
    assert total >= 100


def test_composite_blocks_are_tight() -> None:
    """Above the exact norm, and less than 1 + 1e-9 times it (where the product does not cancel)."""
    weights = relu_chain(np.random.default_rng(1), (4, 5, 5, 3), "gauss")
    form = lb.from_weights(weights, activation="relu")
    exact = chain_blocks(weights, Fraction(1, 2), Fraction(1, 2))
    for part in _triangle.triangle(form, Request(), pairwise=False, centred=True).parts:
        assert not exceeds(Fraction(part.value) * (1 - Fraction(1, 10**9)), exact[part.source, part.target])


def test_without_the_rounding_term_composite_blocks_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: products without their error are below the exact norm where they cancel."""
    monkeypatch.setattr(enclosures, "gamma", lambda n: 0.0)
    monkeypatch.setattr(enclosures, "U", 0.0)
    rng = np.random.default_rng(0)
    below = sum(check_chain(relu_chain(rng, (3, 4, 3, 2), "cancelling"))[1] for _ in range(8))
    assert below >= 3


@pytest.mark.slow
def test_the_recursion_itself_rounds_up() -> None:
    """value >= the recursion in exact rationals on the block norms that were used."""
    for seed in range(20):
        weights = relu_chain(np.random.default_rng(seed), (3, 4, 4, 4, 2), "gauss")
        form = lb.from_weights(weights, activation="relu")
        for centred in (True, False):
            result = _triangle.triangle(form, Request(), pairwise=True, centred=centred)
            reach = {"input": Fraction(1)}
            for target in (*(f"relu[{k}]" for k in range(len(weights) - 1)), "output"):
                reach[target] = sum(
                    (Fraction(p.value) * reach[p.source] for p in result.parts if p.target == target),
                    Fraction(0),
                )
            assert Fraction(result.value) >= reach["output"]
            assert result.value <= float(reach["output"]) * (1 + 1e-13)
    for seed in range(8):  # long products of naive, where half a rounding for each layer would be seen
        weights = relu_chain(np.random.default_rng(seed), (1,) * 81, "gauss")
        result = _triangle.triangle(
            lb.from_weights(weights, activation="relu"), Request(), pairwise=False, centred=False
        )
        assert len(result.parts) == 80
        assert Fraction(result.value) >= math.prod(Fraction(p.value) for p in result.parts)


# ----------------------------------------------------------------------------------- every ReLU pattern
def patterns(n: int) -> np.ndarray:
    return np.array(list(itertools.product([0.0, 1.0], repeat=n)))


def residual(rng: np.random.Generator) -> tuple[LureForm, np.ndarray]:
    """(form, Jacobians at all patterns) of z = h + B relu(A h + b), h = W1 relu(W0 x) - x/2; 2 x 5 neurons."""
    w0, w1, a, b = gauss(rng, 5, 3), gauss(rng, 3, 5), gauss(rng, 5, 3), gauss(rng, 3, 5)

    def fn(x: jax.Array) -> jax.Array:
        h = w1 @ jax.nn.relu(w0 @ x) - 0.5 * x
        return h + b @ jax.nn.relu(a @ h + 0.1)

    p = patterns(5)
    inner = np.einsum("ij,pj,jk->pik", w1, p, w0) - 0.5 * np.eye(3)
    outer = np.einsum("ij,pj,jk->pik", b, p, a) + np.eye(3)
    return lb.trace(fn, jnp.zeros(3)), np.einsum("pij,qjk->pqik", outer, inner).reshape(-1, 3, 3)


def concatenated(rng: np.random.Generator) -> tuple[LureForm, np.ndarray]:
    """z = C [relu(A x), relu(B x), x]: two taps of one level."""
    a, b, c = gauss(rng, 4, 3), gauss(rng, 5, 3), gauss(rng, 4, 12)
    form = lb.trace(lambda x: c @ jnp.concatenate([jax.nn.relu(a @ x), jax.nn.relu(b @ x), x]), jnp.zeros(3))
    whole = np.concatenate([a, b])
    jacobians = np.einsum("ij,pj,jk->pik", c[:, :9], patterns(9), whole) + np.asarray(c[:, 9:], float)
    return form, jacobians


def steepest(jacobians: np.ndarray, norm: float) -> float:
    """The largest induced norm over all patterns: what any bound from slopes in [0, 1] must reach."""
    if norm == 2:
        return float(np.linalg.norm(jacobians, 2, axis=(1, 2)).max())
    return float(np.abs(jacobians).sum(axis=1 if norm == 1 else 2).max())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("build", [residual, concatenated])
@pytest.mark.parametrize("norm", NORMS)
def test_bounds_are_above_every_pattern(build: Callable[..., Any], norm: float) -> None:
    for seed in range(3):
        form, jacobians = build(np.random.default_rng(seed))
        truth = steepest(jacobians, norm)
        bounds = [lb.naive(form, norm=norm, pairwise=True), lb.liplt(form, norm=norm, pairwise=True)]
        if norm == 2:
            bounds += [lb.liplt(form, scaling=s, pairwise=True) for s in ("aol", "sll", "optimized")]
        dual = {2: 2, 1: math.inf, math.inf: 1}[norm]
        for bound in bounds:
            assert truth <= bound.value * (1 + 1e-12)
            assert bound.value <= 12 * truth, "looser than anything seen on these nets"
            for i, j in itertools.combinations(range(form.num_outputs), 2):
                gap = np.linalg.norm(jacobians[:, i] - jacobians[:, j], dual, axis=1).max()
                assert bound.pairwise is not None and gap <= bound.pairwise[i, j] * (1 + 1e-12)
        assert bounds[1].value <= bounds[0].value and all(b.value <= bounds[1].value for b in bounds[2:])


# ------------------------------------------------------------------------------------------- partitions
def split_everywhere(cut: int) -> Callable[[jax.Array], jax.Array]:
    """relu in two calls of flat halves."""

    def activation(h: jax.Array) -> jax.Array:
        flat = h.ravel()
        return jnp.concatenate([jax.nn.relu(flat[:cut]), jax.nn.relu(flat[cut:])]).reshape(h.shape)

    return activation


def small_cnn(rng: np.random.Generator, activation: Callable[[jax.Array], jax.Array]) -> LureForm:
    k1, k2, w = gauss(rng, 2, 1, 3, fan_in=3), gauss(rng, 2, 2, 3, fan_in=6), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = activation(jax.lax.conv(x[None, None], k1, (1,), "SAME"))
        h = h + activation(jax.lax.conv(h, k2, (1,), "SAME"))
        return w @ h.ravel()

    return lb.trace(fn, jnp.zeros(6))


@pytest.mark.parametrize("norm", NORMS)
def test_splitting_the_relus_of_a_residual_cnn_does_not_raise_the_bound(norm: float) -> None:
    whole = small_cnn(np.random.default_rng(2), jax.nn.relu)
    split = small_cnn(np.random.default_rng(2), split_everywhere(5))
    assert len(whole.taps) == 2 and len(split.taps) == 4
    for verb in (lb.naive, lb.liplt):
        one, two = verb(whole, norm=norm, pairwise=True), verb(split, norm=norm, pairwise=True)
        assert two.value <= one.value * (1 + 1e-9)
        assert (two.pairwise <= one.pairwise * (1 + 1e-9)).all()
        assert (two.per_class <= one.per_class * (1 + 1e-9)).all()


def test_the_result_is_the_smallest_over_the_partitions() -> None:
    """Value, pairs and classes each on their own; and stacking is what helps a split net."""
    split = small_cnn(np.random.default_rng(2), split_everywhere(5))
    nodes = _triangle.partitions(split)
    assert nodes == [((0,), (1,), (2,), (3,)), ((0, 1), (2, 3))]
    scalings = _triangle.loop_transform(split, 2, centred=True)
    runs = [_triangle.recursion(split, n, scalings, Request(), pairwise=True) for n in nodes]
    best = _triangle.triangle(split, Request(), pairwise=True, centred=True)
    assert best.value == min(r.value for r in runs) < max(r.value for r in runs)
    assert np.array_equal(best.pairwise, np.minimum(*(r.pairwise for r in runs)))
    assert np.array_equal(best.per_class, np.minimum(*(r.per_class for r in runs)))


def test_one_partition_where_stacking_changes_nothing() -> None:
    assert _triangle.partitions(form_of("relu")) == [((0,), (1,))]
    assert _triangle.partitions(form_of("linear")) == [()]


# ------------------------------------------------------------------------------------------ probabilistic
@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "name", ["cnn_batch_norm", "two_branches", "u_net", "max_pool_overlapping", "dense_net"]
)
def test_blocks_above_the_limit_are_probabilistic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(name)
    verified = {verb: verb(form, pairwise=True) for verb in (lb.naive, lb.liplt)}
    monkeypatch.setattr(_triangle, "DENSE_LIMIT", 3)
    monkeypatch.setattr(wide_blocks, "_CHEAP", wide_blocks._Cost(0, 0))
    # no block is small enough for a banded proof
    monkeypatch.setattr(wide_blocks, "_CHEAPER", wide_blocks._Cost(0, 0))
    for verb, truth in verified.items():
        bound = verb(form, pairwise=True)
        assert truth.guarantee == "verified" and truth.failure_probability == 0.0
        assert bound.guarantee == "probabilistic" and bound.failure_probability == _triangle.FAILURE == 1e-9
        assert truth.value * (1 - 1e-9) <= bound.value <= truth.value * 1.01
        assert (truth.pairwise * (1 - 1e-9) <= bound.pairwise).all()
        assert (bound.pairwise <= truth.pairwise * 1.01).all()
        likely = [p for p in bound.parts if p.guarantee == "probabilistic"]
        assert likely and all(p.how.startswith("Golub-Kahan") and min(p.shape) > 3 for p in likely)
        assert all(p.how == "Cholesky" for p in bound.parts if p.guarantee == "verified")
        assert verb(form, guarantee="verified", pairwise=True).value == truth.value


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms_are_verified_whatever_the_size(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triangle, "DENSE_LIMIT", 3)
    bound = lb.liplt(form_of("relu"), norm=norm)
    assert bound.guarantee == "verified" and {p.how for p in bound.parts} == {"exact sums"}


def test_matrix_free_products_are_the_blocks() -> None:
    """What Golub-Kahan iterates on: G u and G'v of every block, stacked nodes too, against the dense gain."""
    form = small_cnn(np.random.default_rng(2), split_everywhere(5))
    scalings = _triangle.loop_transform(form, 2, centred=True)
    truth, rng = dense_gain(form, scalings), np.random.default_rng(0)
    for source, target in [((), (0, 1)), ((0, 1), (2, 3)), ((1,), (2,)), ((), (3,))]:
        parts: list[Node] = [(j,) for j in source] if source else [()]
        block = np.block([[truth[part, (k,)] for part in parts] for k in target])
        product = BlockProduct(_triangle.host_form(form), source, target, scalings)
        u, v = (rng.normal(size=n) for n in block.shape[::-1])
        several = rng.normal(size=(block.shape[1], 3))
        assert np.allclose(product.forward(u), block @ u, rtol=1e-12, atol=1e-12)
        assert np.allclose(product.backward(v), block.T @ v, rtol=1e-12, atol=1e-12)
        assert np.allclose(product.forward(several), block @ several, rtol=1e-12, atol=1e-12)


def test_progress_names_every_block() -> None:
    form, said = form_of.__wrapped__("relu"), list[str]()  # a new one, of which nothing is proved yet
    scalings = _triangle.loop_transform(form, 2, centred=True)
    pairs = _triangle.structure(_triangle.host_form(form), [(0,), (1,)], scalings)
    with reporting(said.append):
        _triangle.block_norms(form, pairs, scalings, Request())
    names = ("input to relu[0]", "input to relu[1]", "relu[0] to relu[1]")
    assert sorted(said) == [f"norm of {name}" for name in names]


def test_assumed_slopes_are_the_weakest_word(rng: np.random.Generator) -> None:
    form = form_of("relu")
    result = _triangle.triangle(form, Request(guarantee="probabilistic"), pairwise=False, centred=True)
    assert result.guarantee == "probabilistic"
    first = _triangle.triangle(form, Request(), pairwise=True, centred=True)
    second = _triangle.triangle(form, Request(guarantee="probabilistic"), pairwise=True, centred=True)
    both = _triangle.smaller(first, second)
    assert both.guarantee == "probabilistic" and both.failure == 1e-9, "pairs may come from either"


def test_equal_blocks_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    proof = norms.verified_norm
    host = HostForm(form_of("relu"))
    monkeypatch.setattr(norms, "verified_norm", lambda a, *r, **k: calls.append(a) or proof(a, *r, **k))
    a = np.random.default_rng(0).normal(size=(4, 5))
    values = [_triangle.block_norm(host, linmap.Enclosure(2.0**k * a), 2) for k in (0, 3, -90, 0)]
    assert len(calls) == 1 and values == [2.0**k * values[0] for k in (0, 3, -90, 0)]
    _triangle.block_norm(host, linmap.Enclosure(a.T), 2)
    _triangle.block_norm(host, linmap.Enclosure(np.nextafter(a, 9)), 2)
    assert len(calls) == 3
    assert _triangle.block_norm(host, linmap.Enclosure(a, 0.5), 2) >= values[0] + 0.5 and len(calls) == 3


# ---------------------------------------------------------------------------------------------- scalings
def scaled_recursion(
    blocks: dict[tuple[Node, Node], np.ndarray], factors: dict[Node, np.ndarray], nodes: list[Node]
) -> float:
    """sum over paths of ||S_k G S_j^-1||, with S = 1/f, by NumPy."""
    reach: dict[Node, float] = {(): 1.0}
    for target in [*nodes, ()]:
        total = 0.0
        for source in [(), *nodes]:
            block = blocks.get((source, target))
            if block is None or (source == target and source):
                continue
            rows = 1 / factors[target] if target else np.ones(len(block))
            cols = factors[source] if source else np.ones(block.shape[1])
            if source in reach:
                total += np.linalg.norm(rows[:, None] * block * cols, 2) * reach[source]
        if not target:
            return total
        reach[target] = total
    raise AssertionError


@pytest.mark.parametrize("build", [residual, concatenated])
def test_any_positive_scaling_is_valid_and_equals_the_dense_recursion(build: Callable[..., Any]) -> None:
    form, jacobians = build(np.random.default_rng(7))
    nodes: list[Node] = [(k,) for k in range(len(form.taps))]
    scalings = _triangle.loop_transform(form, 2, centred=True)
    truth, blocks = dense_gain(form, scalings), _scaling.stored_blocks(form, nodes, scalings)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        factors: dict[Node, np.ndarray] = {
            n: np.exp(rng.normal(size=form.taps[n[0]].size_out)) for n in nodes
        }
        result = _scaling.run(form, nodes, scalings, blocks, factors, Request(), pairwise=True)
        assert result.guarantee == "verified"
        expected = scaled_recursion(truth, factors, nodes)
        assert expected * (1 - 1e-12) <= result.value <= expected * (1 + 1e-9)
        assert steepest(jacobians, 2) <= result.value
        gaps = np.linalg.norm(jacobians[:, :, None] - jacobians[:, None, :], axis=3).max(axis=0)
        assert result.pairwise is not None and (gaps <= result.pairwise * (1 + 1e-12)).all()


def test_a_neuron_that_reaches_nothing_is_dropped() -> None:
    """Its row and column vanish from every block, with a scaling or without."""
    w0 = np.array([[1.0, 2.0], [1e6, 1e6], [0.5, -1.0]])
    w1 = np.array([[1.0, 0.0, -1.0], [2.0, 0.0, 1.0]])
    form = lb.from_weights([w0, w1], activation="relu")
    alive = lb.from_weights([w0[::2], w1[:, ::2]], activation="relu")
    for scaling in ("aol", "sll", "optimized"):
        assert lb.liplt(form, scaling=scaling).value == pytest.approx(
            lb.liplt(alive, scaling=scaling).value, rel=1e-4
        )
    for verb, norm in itertools.product((lb.naive, lb.liplt), (1, 2, np.inf)):
        assert verb(form, norm=norm).value == pytest.approx(verb(alive, norm=norm).value, rel=1e-9)
    jacobians = np.einsum("ij,pj,jk->pik", w1, patterns(3), w0)
    assert steepest(jacobians, 2) <= lb.liplt(form, scaling="optimized").value < 10


# ------------------------------------------------------------------------------------------------- cores
@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "name", ["gelu_exact", "prelu", "dense_net", "u_net", "maxmin_mlp", "reduce_max_head"]
)
@pytest.mark.parametrize("verb", [lb.naive, lb.liplt], ids=["naive", "liplt"])
def test_cores_reach_the_public_verb(name: str, verb: Any) -> None:
    """After 100 steps: within 1e-3, never above the proof (float32 rounding aside), pairs and classes too."""
    form = form_of(name)
    state = verb.core.init(form, jax.random.key(1))
    constants, _ = jax.jit(functools.partial(verb.core, steps=100, pairwise=True))(form, state)
    centred = verb is lb.liplt
    proved = _triangle.triangle(form, Request(), pairwise=True, centred=centred)
    assert verb(form).value == pytest.approx(proved.value, rel=1e-12)
    for guess, proof in (
        (constants.value, proved.value),
        (constants.per_class, proved.per_class),
        (constants.pairwise, proved.pairwise),
    ):
        assert np.allclose(guess, proof, rtol=1e-3, atol=1e-4)
        assert (np.asarray(guess) <= proof * (1 + 1e-4) + 1e-4).all()


def test_estimates_of_pairs_are_symmetric_to_the_last_bit(rng: np.random.Generator) -> None:
    """The sum over the sources rounds differently at (i, j) and (j, i), which an Estimate does not accept."""
    sizes = (3, 5, 4, 3, 5)
    form = lb.from_weights([gauss(rng, m, n) for n, m in itertools.pairwise(sizes)])
    pairs = lb.liplt(form, pairwise=True, guarantee="estimate").pairwise
    assert np.array_equal(pairs, pairs.T) and pairs[0, 1] > 0


@pytest.mark.slow
def test_warm_starts_make_up_for_few_steps() -> None:
    form = form_of("dense_net")
    step = jax.jit(functools.partial(lb.liplt.core, steps=2))
    state = lb.liplt.core.init(form, jax.random.key(0))
    proved, errors = lb.liplt(form).value, []
    for _ in range(30):
        constants, state = step(form, state)
        errors.append(abs(float(constants.value) / proved - 1))
    assert errors[-1] < 1e-4 < errors[0]


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("verb", [lb.naive, lb.liplt], ids=["naive", "liplt"])
def test_gradients_are_difference_quotients_in_float64(verb: Any) -> None:
    """d value / d weights through the trace, residual net, against central differences of the same core."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        params = tuple(jnp.asarray(rng.normal(size=s) / 2) for s in ((6, 4), (4, 6), (5, 4), (3, 5)))
        directions = tuple(jnp.asarray(rng.normal(size=p.shape)) for p in params)

        def form_at(p: Any) -> LureForm:
            def fn(x: jax.Array) -> jax.Array:
                h = x + p[1] @ jax.nn.leaky_relu(p[0] @ x, 0.25)
                return p[3] @ jnp.tanh(p[2] @ h)

            return lb.trace(fn, jnp.ones(4))

        state = verb.core.init(form_at(params), jax.random.key(0), dtype=jnp.float64)

        def value(p: Any, state: Any, steps: int = 60) -> Any:
            constants, state = verb.core(form_at(p), state, steps=steps, pairwise=True)
            return constants.value + 0.1 * jnp.sum(constants.pairwise), state

        _, state = jax.jit(functools.partial(value, steps=2000))(params, state)
        grads = jax.jit(jax.grad(lambda p: value(p, state, steps=1)[0]))(params)
        slope = float(sum(jnp.sum(g * d) for g, d in zip(grads, directions, strict=True)))
        moved = jax.jit(
            lambda t: value(tuple(a + t * d for a, d in zip(params, directions, strict=True)), state)[0]
        )
        h = 1e-5
        quotient = (float(moved(h)) - float(moved(-h))) / (2 * h)
    assert slope == pytest.approx(quotient, rel=1e-5)


def test_cores_under_vmap_and_jit_at_once() -> None:
    """A batch of networks as one pytree, mapped over its leaves."""
    rng = np.random.default_rng(0)
    forms = [
        lb.from_weights([np.asarray(gauss(rng, 6, 4)), np.asarray(gauss(rng, 3, 6))], activation="tanh")
        for _ in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *forms)
    state = lb.liplt.core.init(forms[0], jax.random.key(0))
    run = functools.partial(lb.liplt.core, steps=60, pairwise=True)
    together, _ = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, state)
    assert together.value.shape == (3,) and together.pairwise.shape == (3, 3, 3)
    for k, form in enumerate(forms):
        assert float(together.value[k]) == pytest.approx(lb.liplt(form).value, rel=1e-3)
