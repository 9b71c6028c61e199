"""Proofs of LipSDP against rational arithmetic: what the floats prove holds exactly, and not without the margins."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from exact import exceeds, fractions, product
from zoo import NETS

import lipbounds as lb
from lipbounds._lipsdp import proof, tap_proof
from lipbounds._lipsdp.dense_form import dense_gain
from lipbounds._lipsdp.proof import Infeasible, prove_psd
from lipbounds._lipsdp.state_matrices import Sequence, sequence
from lipbounds._norms import schur
from lipbounds._norms.enclosures import Enclosure

Rational = list[list[Fraction]]
ACTIVATIONS = {"relu": (0.0, 1.0), "leaky": (0.1, 1.0), "abs": (-1.0, 1.0), "steep": (-0.3, 2.7)}


# --- rational arithmetic -------------------------------------------------------------------------------------------


def transposed(a: Rational) -> Rational:
    return [list(column) for column in zip(*a, strict=True)]


def combined(a: Rational, b: Rational, sign: int = 1) -> Rational:
    return [[x + sign * y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def diagonal(d: list[Fraction]) -> Rational:
    return [[d[i] if i == j else Fraction(0) for j in range(len(d))] for i in range(len(d))]


def solved(a: Rational, b: Rational) -> Rational:
    """A^-1 B by elimination; A nonsingular."""
    rows = [list(p) + list(q) for p, q in zip(a, b, strict=True)]
    n = len(a)
    for k in range(n):
        pivot = next(i for i in range(k, n) if rows[i][k] != 0)
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(n):
            if i != k and rows[i][k] != 0:
                factor = rows[i][k]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    return [row[n:] for row in rows]


def is_psd(a: Rational) -> bool:
    """Exact: symmetric elimination, where a zero pivot needs a zero row."""
    m = [list(row) for row in a]
    for k in range(len(m)):
        if m[k][k] < 0:
            return False
        if m[k][k] == 0:
            if any(m[k][j] != 0 for j in range(k, len(m))):
                return False
            continue
        for i in range(k + 1, len(m)):
            factor = m[i][k] / m[k][k]
            for j in range(k, len(m)):
                m[i][j] -= factor * m[k][j]
    return True


def exact_advance(s: Rational, a: Rational, b: Rational, w: Rational, d: list[Fraction]) -> Rational:
    """S+ = A (S + S W' (D - W S W')^-1 W S) A' + B D B'."""
    if not d:
        return product(product(a, s), transposed(a))
    ws = product(w, s)
    q = combined(diagonal(d), product(ws, transposed(w)), -1)
    x = combined(s, product(transposed(ws), solved(q, ws)))
    return combined(product(product(a, x), transposed(a)), product(product(b, diagonal(d)), transposed(b)))


def member(m: Enclosure, rng: np.random.Generator) -> Rational:
    """A matrix of the enclosure on its boundary: the whole error in one entry."""
    out = fractions(m.midpoint_for_search())
    if m.error > 0.0 and m.stored:
        i, j = rng.integers(m.shape[0]), rng.integers(m.shape[1])
        out[i][j] += Fraction(m.error) * int(rng.choice([-1, 1]))
    return out


def exact_out(seq: Sequence, D: tuple[np.ndarray, ...], rng: np.random.Generator) -> Rational:
    start = member(seq.start, rng)
    s = product(start, transposed(start))
    for segment, d in zip(seq.segments, D, strict=True):
        a, b, w = (member(m, rng) for m in (segment.A, segment.B, segment.W))
        s = exact_advance(s, a, b, w, [Fraction(float(x)) for x in d])
    return s


def covers(ellipsoid: proof.Ellipsoid, s: Rational) -> bool:
    """2**scale S_out >= s exactly."""
    factor = Fraction(2) ** ellipsoid.scale
    return is_psd(combined([[factor * x for x in row] for row in fractions(ellipsoid.matrix)], s, -1))


# --- networks and multipliers --------------------------------------------------------------------------------------


def chain(
    widths: list[int], seed: int, slopes: tuple[float, float] = (0.0, 1.0), gain: float = 1.0
) -> lb.LureForm:
    rng = np.random.default_rng(seed)
    weights = [
        (gain * rng.standard_normal((m, n)) / math.sqrt(n)).astype(np.float32) for n, m in pairwise(widths)
    ]
    return lb.from_weights(weights, slopes=[slopes] * (len(weights) - 1))


def multipliers(seq: Sequence, factor: float = 2.0, p: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """D = factor lambda_max(W S W') along the sequence, in plain floats: feasible for every network."""
    start = seq.start.midpoint_for_search()
    s = (start if p is None else start * p) @ start.T
    out = []
    for segment in seq.segments:
        a, b, w = (m.midpoint_for_search() for m in (segment.A, segment.B, segment.W))
        sy = w @ s @ w.T
        top = float(np.linalg.eigvalsh(sy)[-1]) if len(sy) else 0.0
        d = np.full(len(sy), factor * top if top > 0.0 else 1.0)
        out.append(d)
        through = a @ s @ w.T
        s = a @ s @ a.T + (b * d) @ b.T
        if len(d):
            s = s + through @ np.linalg.solve(np.diag(d) - sy, through.T)
        s = (s + s.T) / 2
    return tuple(out)


def blurred(seq: Sequence, error: float) -> Sequence:
    def blur(m: Enclosure) -> Enclosure:
        return Enclosure(m.midpoint_for_search(), error)

    segments = tuple(replace(s, A=blur(s.A), B=blur(s.B), W=blur(s.W)) for s in seq.segments)
    return replace(seq, start=blur(seq.start), segments=segments)


# --- matrices ------------------------------------------------------------------------------------------------------


def nearly_singular(seed: int) -> np.ndarray:
    """An exactly singular integer Gram matrix, one diagonal entry lowered by a few units in the last place."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 24))
    half = rng.integers(-(2**20), 2**20, (n, n - 1)).astype(float)
    m = half @ half.T  # below 2**53: exact
    assert np.abs(m).max() < 2**53
    scale = 2.0 ** rng.integers(-20, 20, n)
    m *= scale[:, None] * scale
    k = int(rng.integers(n))
    m[k, k] -= int(rng.integers(1, 40)) * np.spacing(m[k, k])
    return m


def false_proofs(count: int) -> list[int]:
    return [seed for seed in range(count) if prove_psd(nearly_singular(seed))]


def test_a_matrix_that_is_not_psd_is_never_proved_and_the_shift_is_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_psd(fractions(nearly_singular(3)))
    assert false_proofs(200) == []
    monkeypatch.setattr(tap_proof, "U", 0.0)
    monkeypatch.setattr(schur, "U", 0.0)
    wrong = false_proofs(200)
    assert wrong, "without the shift no proof was wrong: the matrices are too easy"
    assert not is_psd(fractions(nearly_singular(wrong[0])))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_prove_psd_accepts_what_is_positive_definite(size: int) -> None:
    rng = np.random.default_rng(size)
    half = rng.standard_normal((size, size + 3))
    m = half @ half.T
    least = float(np.linalg.eigvalsh(m)[0])
    for exponent in (0, 600, -600):
        assert prove_psd(np.ldexp(m, exponent))
        assert prove_psd(np.ldexp(m, exponent), math.ldexp(0.9 * least, exponent))
        assert not prove_psd(np.ldexp(m, exponent), math.ldexp(1.1 * least, exponent))
    grading = 2.0 ** rng.integers(-60, 60, size)
    assert prove_psd(m * grading[:, None] * grading)


def test_prove_psd_on_edges() -> None:
    assert prove_psd(np.zeros((3, 3))) and prove_psd(np.zeros((0, 0)))
    assert not prove_psd(np.zeros((3, 3)), 1e-300)
    assert not prove_psd(np.diag([1.0, -1e-300]))
    assert not prove_psd(np.array([[0.0, 0.0], [1e-300, 1.0]]))
    assert prove_psd(np.array([[0.0, 7.0], [0.0, 1.0]]))  # the upper triangle is not read
    for bad in (math.nan, math.inf, -math.inf):
        assert not prove_psd(np.array([[2.0, 0.0], [bad, 2.0]]))
        assert not prove_psd(np.diag([2.0, bad]))
    assert not prove_psd(np.eye(2), -1.0)


# --- sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_output_ellipsoid_covers_the_exact_one(name: str, seed: int) -> None:
    widths = [[3, 4, 4, 3], [4, 3, 5, 2], [2, 5, 3, 4, 2]][seed]
    seq = sequence(chain(widths, seed, ACTIVATIONS[name]))
    D = multipliers(seq, 1.3)
    ellipsoid = proof.propagate_sequence(seq, D)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        assert covers(ellipsoid, exact_out(seq, D, rng))
    plain = np.array([[float(x) for x in row] for row in exact_out(seq, D, rng)])
    top = math.sqrt(np.linalg.eigvalsh(plain)[-1])
    assert top <= proof.largest_root(*ellipsoid) <= top * (1 + 1e-11)


@pytest.mark.parametrize("error", [1e-9, 1e-4, 1e-2])
def test_the_output_ellipsoid_covers_every_matrix_of_the_enclosures(error: float) -> None:
    seq = blurred(sequence(chain([3, 4, 3, 2], 5, (0.1, 1.0))), error)
    D = proof.repair(seq, multipliers(seq, 1.2))
    ellipsoid = proof.propagate_sequence(seq, D)
    rng = np.random.default_rng(0)
    assert all(covers(ellipsoid, exact_out(seq, D, rng)) for _ in range(30))
    sharp = proof.propagate_sequence(sequence(chain([3, 4, 3, 2], 5, (0.1, 1.0))), D)
    assert not all(covers(sharp, exact_out(seq, D, rng)) for _ in range(30))


def test_without_margins_a_proof_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same networks, all allowances for rounding removed: some ellipsoid is too small."""
    nets = [sequence(chain([4, 3, 3, 2], seed)) for seed in range(16)]
    exact = [
        (seq, D, exact_out(seq, D, np.random.default_rng(1))) for seq in nets for D in [multipliers(seq)]
    ]

    def covered() -> list[bool]:
        return [covers(proof.propagate_sequence(seq, D), s) for seq, D, s in exact]

    assert all(covered())
    monkeypatch.setattr(tap_proof, "prove_psd", lambda m, slack=0.0: True)  # it refuses what has no margin
    assert all(covered())
    monkeypatch.setattr(tap_proof, "U", 0.0)
    monkeypatch.setattr(schur, "U", 0.0)
    monkeypatch.setattr(tap_proof, "gamma", lambda n: 0.0)
    monkeypatch.setattr(tap_proof, "_enclosure_slack", lambda tap, s, d, a, w: (0.0, np.zeros(len(w))))
    assert not all(covered())


def test_a_deep_network_keeps_nine_digits() -> None:
    seq = sequence(chain([64] * 66, 0, (0.1, 1.0), gain=1.5))
    D = multipliers(seq)
    s = seq.start.midpoint_for_search() @ seq.start.T.midpoint_for_search()
    for segment, d in zip(seq.segments, D, strict=True):
        a, b, w = (m.midpoint_for_search() for m in (segment.A, segment.B, segment.W))
        through = a @ s @ w.T
        s = a @ s @ a.T + (b * d) @ b.T + through @ np.linalg.solve(np.diag(d) - w @ s @ w.T, through.T)
    float_value = math.sqrt(np.linalg.eigvalsh((s + s.T) / 2)[-1])
    value = proof.largest_root(*proof.propagate_sequence(seq, D))
    assert value == pytest.approx(float_value, rel=1e-9) and value >= float_value * (1 - 1e-12)


@pytest.mark.parametrize("exponent", [-300, -40, 40, 300])
def test_the_units_of_weights_do_not_matter(exponent: int) -> None:
    plain = sequence(chain([6, 5, 4, 3], 2))
    D = multipliers(plain)

    def power(m: Enclosure, e: int) -> Enclosure:
        return Enclosure(np.ldexp(m.midpoint_for_search(), e), math.ldexp(m.error, e))

    scaled = replace(plain, start=power(plain.start, exponent))
    raised = tuple(np.ldexp(d, 2 * exponent) for d in D)
    first, second = proof.propagate_sequence(plain, D), proof.propagate_sequence(scaled, raised)
    assert proof.largest_root(*second) == math.ldexp(proof.largest_root(*first), exponent)
    assert np.array_equal(first.matrix, second.matrix)


def test_zero_and_dead_parts_give_exact_zeros() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((5, 4)), rng.standard_normal((6, 5)), rng.standard_normal((3, 6))]
    dead = lb.from_weights([weights[0], np.zeros((6, 5)), weights[2]], activation="relu")
    seq = sequence(dead)
    ellipsoid = proof.propagate_sequence(seq, multipliers(seq))
    assert proof.largest_root(*ellipsoid) == 0.0 and not proof.pair_roots(*ellipsoid).any()
    nothing = lb.from_weights([np.zeros((5, 4)), weights[1], weights[2]], activation="relu")
    seq = sequence(nothing)
    ellipsoid = proof.propagate_sequence(seq, tuple(np.ones(s.active.size) for s in seq.segments))
    assert proof.largest_root(*ellipsoid) == 0.0
    weights[2][1] = 0.0
    seq = sequence(lb.from_weights(weights, activation="relu"))
    classes = proof.class_roots(*proof.propagate_sequence(seq, multipliers(seq)))
    # the error of A is known for the matrix, not its rows
    assert classes[1] < 1e-5 * min(classes[0], classes[2])


def test_a_linear_network_gets_its_norm() -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((5, 7)), rng.standard_normal((3, 5))]
    form = lb.trace(
        lambda x: weights[1].astype(np.float32) @ (weights[0].astype(np.float32) @ x), np.zeros(7, np.float32)
    )
    seq = sequence(form)
    value = proof.largest_root(*proof.propagate_sequence(seq, ()))
    exact = product(fractions(weights[1].astype(np.float32)), fractions(weights[0].astype(np.float32)))
    assert exceeds(Fraction(value), exact) and not exceeds(Fraction(value * (1 - 1e-12)), exact)


def test_infeasible_multipliers_are_named_and_repaired() -> None:
    seq = sequence(chain([5, 8, 8, 8, 3], 4))
    D = multipliers(seq)
    small = (D[0], D[1] * 0.3, D[2])
    with pytest.raises(Infeasible) as caught:
        proof.propagate_sequence(seq, small)
    assert caught.value.place == 1 and "tap 1" in str(caught.value)
    repaired = proof.repair(seq, small)
    assert np.array_equal(repaired[0], D[0]) and (repaired[1] > small[1]).all()
    value = proof.largest_root(*proof.propagate_sequence(seq, repaired))
    assert value < 2 * proof.largest_root(*proof.propagate_sequence(seq, D))
    assert proof.repair(seq, repaired)[1].tolist() == repaired[1].tolist()


@pytest.mark.parametrize("factor", [1e-320, 1e-30, 1e-3, 1e30])
def test_repair_finds_a_proof_from_anywhere(factor: float) -> None:
    seq = sequence(chain([5, 8, 8, 3], 4, (-1.0, 1.0)))
    D = proof.repair(seq, tuple(np.maximum(d * factor, 5e-324) for d in multipliers(seq)))
    assert math.isfinite(proof.largest_root(*proof.propagate_sequence(seq, D)))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_multipliers_that_are_no_positive_numbers_are_refused(bad: float) -> None:
    seq = sequence(chain([3, 4, 4, 2], 0))
    D = multipliers(seq)
    D[1][2] = bad
    with pytest.raises(ValueError, match="tap 1 must be finite numbers > 0"):
        proof.propagate_sequence(seq, D)


def test_multipliers_of_another_shape_are_refused() -> None:
    seq = sequence(chain([3, 4, 4, 2], 0))
    D = multipliers(seq)
    with pytest.raises(ValueError, match="2 taps, the multipliers are for 1"):
        proof.propagate_sequence(seq, D[:1])
    with pytest.raises(ValueError, match="needs 4 multipliers"):
        proof.propagate_sequence(seq, (D[0], D[1][:3]))


def test_a_given_start_replaces_the_first_state() -> None:
    seq = sequence(chain([4, 6, 5, 3], 2))
    D = multipliers(seq)
    first = proof.first_state(seq)
    usual = proof.propagate_sequence(seq, D)
    assert np.array_equal(proof.propagate_sequence(seq, D, start=first).matrix, usual.matrix)
    odd = (first.matrix * 2.0, first.scale - 1)
    assert proof.largest_root(*proof.propagate_sequence(seq, D, start=odd)) == pytest.approx(
        proof.largest_root(*usual), rel=1e-12
    )
    flat = 2.0 * first.matrix
    assert flat.ndim == 1  # the input itself
    larger = proof.propagate_sequence(
        seq, proof.repair(seq, D, start=(flat, first.scale)), start=(flat, first.scale)
    )
    assert proof.largest_root(*larger) > proof.largest_root(*usual)
    with pytest.raises(ValueError, match="symmetric"):
        proof.propagate_sequence(seq, D, start=(np.triu(np.ones((4, 4))), 0))


# --- inputs in the l-inf norm --------------------------------------------------------------------------------------


def test_weights_of_an_inf_input_are_normalised_and_cover_the_cube() -> None:
    p = proof.ball(3, np.array([2.0, 4.0, 4.0]))
    assert np.allclose(p, [2.0, 4.0, 4.0], rtol=1e-15)
    for weights in (np.ones(3), np.full(7, 7.0), np.array([3.0, 3.0, 3.0]), np.array([1.0, 1e30, 5.0])):
        raised = proof.ball(len(weights), weights)
        assert sum(1 / Fraction(float(x)) for x in raised) <= 1
        assert np.allclose(raised, weights * max(1.0, np.sum(1 / weights)), rtol=1e-12)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weights must be"):
            proof.ball(2, np.array([1.0, bad]))


def test_an_inf_bound_holds_on_the_corners_and_is_exact_for_one_row() -> None:
    rng = np.random.default_rng(3)
    row = rng.standard_normal((1, 6)).astype(np.float32)
    seq = sequence(lb.trace(lambda x: row @ x, np.zeros(6, np.float32)))
    size = np.abs(row[0]).astype(float)
    ellipsoid = proof.propagate_sequence(seq, (), weights=size.sum() / size)
    assert size.sum() <= proof.class_roots(*ellipsoid)[0] <= size.sum() * (1 + 1e-12)
    seq = sequence(chain([6, 8, 8, 3], 7))
    p = np.full(6, 6.0)
    ellipsoid = proof.propagate_sequence(seq, multipliers(seq, p=p), weights=p)
    form = chain([6, 8, 8, 3], 7)
    x = rng.standard_normal((200, 6))
    steps = rng.choice([-1e-3, 1e-3], (200, 6))
    moved = np.array(
        [
            np.asarray(form(a + b)) - np.asarray(form(a))
            for a, b in zip(x.astype(np.float32), steps.astype(np.float32), strict=True)
        ]
    )
    assert (np.abs(moved).max(axis=0) <= 1.01e-3 * proof.class_roots(*ellipsoid)).all()


# --- the dense form ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", ["relu", "tanh", "dense_net", "preactivation_resnet", "max_pool_overlapping", "linear"]
)
def test_the_dense_form_proves_what_the_sequence_proves(name: str) -> None:
    fn, x = NETS[name].make(0)
    form = lb.trace(fn, x)
    seq, gain = sequence(form), dense_gain(form)
    D = multipliers(seq)
    known = {
        s.tap: dict(zip(s.active.tolist(), d, strict=True)) for s, d in zip(seq.segments, D, strict=True)
    }
    dense = np.array([known[k][i] for k, active in enumerate(gain.active) for i in active.tolist()])
    one, other = proof.propagate_sequence(seq, D), proof.propagate_dense(gain, dense)
    assert proof.largest_root(*other) == pytest.approx(proof.largest_root(*one), rel=1e-9)
    assert np.allclose(proof.pair_roots(*other), proof.pair_roots(*one), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_dense_form_covers_the_exact_one(seed: int) -> None:
    gain = dense_gain(chain([3, 3, 4, 2], seed, ACTIVATIONS["leaky"]))
    D = proof.repair_dense(gain, np.full(gain.Gy.shape[0], 0.1))
    ellipsoid = proof.propagate_dense(gain, D)
    d = [Fraction(float(x)) for x in D]
    gy, gz = fractions(gain.Gy.midpoint_for_search()), fractions(gain.Gz.midpoint_for_search())
    t = diagonal([1 / x for x in d])
    q = combined(
        diagonal([Fraction(1)] * gain.n + [1 / x for x in d]), product(product(transposed(gy), t), gy), -1
    )
    assert is_psd(q)
    assert covers(ellipsoid, product(gz, solved(q, transposed(gz))))


def test_infeasible_dense_multipliers() -> None:
    gain = dense_gain(chain([3, 6, 6, 2], 1))
    with pytest.raises(Infeasible):
        proof.propagate_dense(gain, np.full(gain.Gy.shape[0], 1e-3))
    D = proof.repair_dense(gain, np.full(gain.Gy.shape[0], 1e-3))
    assert math.isfinite(proof.largest_root(*proof.propagate_dense(gain, D)))
    assert np.array_equal(proof.repair_dense(gain, D), D)


# --- constants -----------------------------------------------------------------------------------------------------


def test_roots_are_above_the_exact_ones_and_near() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        half = rng.standard_normal((4, 4))
        half[1] = half[0] * (1 + 1e-9 * rng.standard_normal())  # two classes that hardly differ
        low = np.tril(half @ half.T)
        s = low + np.tril(low, -1).T
        exact = fractions(s)
        value = Fraction(proof.largest_root(s, -6)) * 8
        assert is_psd(combined(diagonal([value**2] * 4), exact, -1))
        slightly = value * (1 - Fraction(1, 10**11))
        assert not is_psd(combined(diagonal([slightly**2] * 4), exact, -1))
        pairs, classes = proof.pair_roots(s, 4), proof.class_roots(s, 4)
        assert np.array_equal(pairs, pairs.T) and not pairs.diagonal().any()
        for i in range(4):
            assert (
                exact[i][i]
                <= (Fraction(float(classes[i])) / 4) ** 2
                <= exact[i][i] * (1 + Fraction(1, 10**14))
            )
            for j in range(i):
                true = exact[i][i] + exact[j][j] - 2 * exact[i][j]
                assert true <= (Fraction(float(pairs[i, j])) / 4) ** 2
                assert (Fraction(float(pairs[i, j])) / 4) ** 2 <= true + Fraction(1, 10**14) * (
                    exact[i][i] + exact[j][j]
                )


def test_a_bound_beyond_float64_is_an_error() -> None:
    with pytest.raises(ValueError, match="float64"):
        proof.largest_root(np.eye(2), 4000)
    with pytest.raises(ValueError, match="even"):
        proof.largest_root(np.eye(2), 3)
