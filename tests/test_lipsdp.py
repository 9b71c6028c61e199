"""lb.lipsdp: at the optimum of its LMI and never below it, sound in every option, plain in every refusal.

The reference and the networks come from test_lipsdp_slow.py, where the long lists are. Networks here share their widths
so that the recursion is compiled once per objective.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attained import Search, attained
from test_lipsdp_slow import (
    ABOVE,
    MEDIAN,
    NOT_BELOW,
    chain,
    crm_net,
    f32,
    gauss,
    needs_cvxpy,
    orthogonal_maxmin,
    pair_row,
    random_net,
    reference,
    residual,
    traced,
)

import lipbounds as lb
from lipbounds._form.lure import LureForm

WIDTHS = [4, 8, 8, 3]
FIRST, SECOND = np.triu_indices(3, 1)
ROUNDING = 1e-9  # of the difference quotients of the search


@functools.cache
def plain(kind: str = "relu", seed: int = 9) -> LureForm:
    return chain(kind, WIDTHS, seed)


@functools.cache
def slope(norm: float = 2) -> Any:
    return attained(Search(plain()), norm)


def max_pool() -> LureForm:
    first, last = f32(*gauss([6, 12], 1), *gauss([4, 3], 2))

    def fn(x: Any) -> Any:
        return last @ (first @ x).reshape(4, 3).max(axis=1)

    return traced(fn, 6)


def dense_net() -> LureForm:
    a, b, c = f32(*(g[0] for g in (gauss([5, 6], 1), gauss([11, 6], 2), gauss([17, 3], 3))))

    def fn(x: Any) -> Any:
        x = jnp.concatenate([x, jax.nn.relu(a @ x)])
        x = jnp.concatenate([x, jnp.tanh(b @ x)])
        return c @ x

    return traced(fn, 5)


def u_net() -> LureForm:
    down, middle, up, last = f32(
        *(g[0] for g in (gauss([8, 6], 1), gauss([6, 3], 2), gauss([3, 6], 3), gauss([12, 2], 4)))
    )

    def fn(x: Any) -> Any:
        skip = jax.nn.relu(down @ x)
        low = jax.nn.relu(middle @ skip)
        return last @ jnp.concatenate([jax.nn.relu(up @ low), skip])

    return traced(fn, 8)


# ------------------------------------------------------------------------- against another solver
@needs_cvxpy
@pytest.mark.slow
def test_random_networks_against_clarabel() -> None:
    """A few of the 108 in test_lipsdp_slow.py."""
    excess = []
    for number in (10, 12, 14, 16, 17, 22, 25):
        _, form = random_net(number)
        excess.append(lb.lipsdp(form).value / reference(form) - 1)
    assert min(excess) >= -NOT_BELOW and max(excess) <= ABOVE and np.median(excess) <= MEDIAN


@pytest.mark.slow
@needs_cvxpy
@pytest.mark.parametrize("kind", ["gelu", "relu", "prelu", "leaky", "tanh", "sigmoid", "abs", "narrow"])
def test_the_recursion_alone_against_clarabel(kind: str) -> None:
    """`iterations` asks for the recursion, without the dense form."""
    form = plain(kind)
    exact = reference(form)
    found = lb.lipsdp(form, solver=lb.Recursion(iterations=900))
    assert found.notes[0].startswith("recursion")
    assert -NOT_BELOW <= found.value / exact - 1 <= ABOVE
    assert -NOT_BELOW <= lb.lipsdp(form).value / exact - 1 <= 2e-5


@pytest.mark.sampled(2)
@needs_cvxpy
@pytest.mark.parametrize(
    "build",
    [lambda: residual("relu", 6, 3, 1, 6), max_pool, dense_net, u_net],
    ids=["residual", "max-pool", "dense", "u-net"],
)
def test_other_architectures_against_clarabel(build: Any) -> None:
    form = build()
    exact = reference(form)
    assert -NOT_BELOW <= lb.lipsdp(form).value / exact - 1 <= 1e-6
    tied = reference(form, tied=True)
    assert -NOT_BELOW <= lb.lipsdp(form, multipliers="layer").value / tied - 1 <= 1e-6
    assert tied > exact * (1 + 1e-4), "the two problems are the same here, so this shows less than it says"


@pytest.mark.sampled(4)
@needs_cvxpy
@pytest.mark.parametrize(
    "options",
    [{}, {"solver": lb.Recursion(iterations=900)}, {"solver": "clarabel"}, {"solver": "scs"}],
    ids=str,
)
def test_positive_weights_give_the_norm_of_the_product_and_the_raw_value_is_told(
    options: dict[str, Any],
) -> None:
    layers = [np.abs(w) for w in gauss(WIDTHS, 4)]
    exact = float(np.linalg.norm(layers[2] @ layers[1] @ layers[0], 2))
    bound = lb.lipsdp(lb.from_weights(layers, activation="relu"), **options)
    assert exact * (1 - 1e-14) <= bound.value <= exact * (1 + 1e-6)
    assert bound.guarantee == "verified"
    if isinstance(options.get("solver"), str):
        (note,) = [n for n in bound.notes if "raw value" in n]
        assert (
            note.startswith(f"{options['solver']}: optimal")
            and "no bound" in note
            and "s with the model" in note
        )
        raw = float(note.split("raw value ")[1].split(",")[0])
        assert raw == pytest.approx(exact, rel=1e-3) and bound.method == f"lipsdp-{options['solver']}"


def test_an_orthogonal_maxmin_chain_has_constant_1() -> None:
    assert 1 - 1e-12 <= lb.lipsdp(orthogonal_maxmin()).value <= 1 + 1e-6


# -------------------------------------------------------------------------------------------- pairs
@needs_cvxpy
@pytest.mark.parametrize("trained", [False, True], ids=["random", "crm"])
@pytest.mark.slow
def test_pairs_against_a_solve_per_pair(trained: bool) -> None:
    """One pass for all pairs, then with multipliers of their own."""
    form = crm_net() if trained else plain()
    exact = np.array([reference(form, pair_row(3, i, j)) for i, j in zip(FIRST, SECOND, strict=True)])
    classes = np.array([reference(form, np.eye(3)[[i]]) for i in range(3)])

    def excess(**options: Any) -> np.ndarray:
        bound = lb.lipsdp(form, pairwise=True, solver=lb.Recursion(**options))
        assert bound.pairwise is not None and bound.per_class is not None
        assert (bound.per_class >= classes * (1 - NOT_BELOW)).all()
        found = bound.pairwise[FIRST, SECOND] / exact - 1
        assert found.min() >= -NOT_BELOW
        return found

    assert excess().max() <= 1e-6
    assert excess(iterations=300).max() <= (0.02 if trained else 0.25)
    assert excess(iterations=300, objective="largest")[exact.argmax()] <= 1e-2
    assert excess(iterations=300, refine=3).max() <= 5e-3
    weights = np.zeros((3, 3))
    weights[FIRST[0], SECOND[0]] = weights[SECOND[0], FIRST[0]] = 1.0
    assert excess(iterations=300, objective=weights)[0] <= 5e-3
    assert excess(objective="largest", refine=2)[np.argsort(-exact)[:2]].max() <= 1e-6


@pytest.mark.slow
def test_no_pass_for_the_pairs_is_worse_than_the_network_allows() -> None:
    bound = lb.lipsdp(plain(), solver=lb.Recursion(objective="largest", iterations=15), pairwise=True)
    assert bound.pairwise is not None
    assert bound.pairwise.max() <= math.sqrt(2) * bound.value * (1 + 1e-9)
    assert (slope().pairs <= bound.pairwise * (1 + ROUNDING)).all()


# --------------------------------------------------------------------------------- the l-inf norm
@pytest.mark.slow
def test_linf_is_sound_and_never_above_liplt() -> None:
    form = plain()
    bound, other = lb.lipsdp(form, norm=math.inf), lb.liplt(form, norm=math.inf)
    assert slope(math.inf).value <= bound.value * (1 + ROUNDING)
    assert bound.value < other.value, "nothing gained, so nothing shown"
    assert bound.norm == math.inf and bound.guarantee == "verified"


@pytest.mark.slow
def test_linf_of_positive_weights() -> None:
    """The constant is the largest row sum of the product: no bound may lie below it."""
    layers = [np.abs(w) for w in gauss(WIDTHS, 4)]
    exact = float(np.abs(layers[2] @ layers[1] @ layers[0]).sum(axis=1).max())
    assert lb.lipsdp(lb.from_weights(layers, activation="relu"), norm=math.inf).value >= exact * (1 - 1e-14)


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "mosek"}, "solver must be one of recursion, clarabel, scs, .*lb.Cvxpy, got 'mosek'"),
        ({"multipliers": "network"}, "'neuron' or 'layer'.*arXiv 2005.02929"),
        ({"multipliers": "both"}, "'neuron' or 'layer', got 'both'$"),
        ({"norm": 1}, "norm=2 and inf.*lb.liplt"),
        ({"norm": 3}, "norm"),
        ({"norm": math.inf, "solver": "scs"}, "solver='scs' is for norm=2"),
        ({"solver": "scs", "guarantee": "estimate"}, "not offered as an estimate"),
        ({"guarantee": "proved"}, "guarantee must be one of"),
        ({"solver": lb.Recursion(objective=np.ones((2, 2)))}, r"symmetric array \(3, 3\)"),
        ({"solver": lb.Recursion(start_at=3)}, r"start_at must lie in 0..2, got 3"),
        ({"solver": lb.Recursion(start_at=1), "norm": math.inf}, "start_at > 0 is for norm=2"),
    ],
    ids=str,
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lb.lipsdp(plain(), **options)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lb.Recursion, {"objective": "median"}, "'mean', 'largest' or an array"),
        (lb.Recursion, {"objective": -np.ones((3, 3))}, "numbers >= 0"),
        (lb.Recursion, {"objective": np.full((3, 3), np.nan)}, "finite numbers"),
        (lb.Recursion, {"objective": np.eye(3)}, "not all 0 off the diagonal"),
        (lb.Recursion, {"objective": np.triu(np.ones((3, 3)))}, "symmetric"),
        (lb.Recursion, {"refine": -1}, "refine must be a whole number >= 0, got -1"),
        (lb.Recursion, {"refine": 1.5}, "refine must be a whole number >= 0, got 1.5"),
        (lb.Recursion, {"iterations": True}, "iterations must be a whole number >= 0, got True"),
        (lb.Recursion, {"start_at": -1}, "start_at must be a whole number >= 0, got -1"),
        (lb.Recursion, {"initial": ()}, "initial is a state of lb.lipsdp.core, got tuple"),
        (lb.Cvxpy, {"name": "mosek"}, "clarabel, scs, got 'mosek'"),
        (lb.Cvxpy, {"memory": -1}, "memory must be a number of bytes >= 1"),
        (lb.Cvxpy, {"memory": "much"}, "memory must be a number of bytes >= 1 or a text"),
        (lb.Cvxpy, {"time_limit": math.nan}, "time_limit must be a positive number"),
    ],
    ids=str,
)
def test_solvers_are_checked_when_they_are_made(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "old, new",
    [
        ({"iterations": 20}, r"lipsdp: iterations=... is now solver=lb.Recursion\(iterations=...\)"),
        ({"refine": 2, "objective": "mean"}, r"Recursion\(refine=...\); objective=... is now"),
        ({"start_at": 0}, r"lb.Recursion\(start_at=...\)"),
        ({"initial": None}, r"lb.Recursion\(initial=...\)"),
        ({"solver": "scs", "memory_gb": 4.0}, r"lb.Cvxpy\(name, memory=...\)"),
        ({"solver": "scs", "time_limit": 9.0}, r"lb.Cvxpy\(name, time_limit=...\)"),
    ],
    ids=str,
)
def test_old_spellings_name_the_new_ones(old: dict[str, Any], new: str) -> None:
    with pytest.raises(TypeError, match=new):
        lb.lipsdp(plain(), **old)


def test_a_name_is_short_for_a_solver_with_its_defaults() -> None:
    usual, same = lb.lipsdp(plain()), lb.lipsdp(plain(), solver=lb.Recursion())
    assert usual.value == same.value and usual.method == same.method == "lipsdp"
    assert lb.Cvxpy("scs", memory="2GB") == lb.Cvxpy("scs", memory=2 * 10**9)
    with pytest.raises(AttributeError):
        lb.Cvxpy().name = "scs"  # type: ignore[misc]


def test_a_form_being_traced_is_refused_and_the_core_named() -> None:
    weights = f32(*gauss(WIDTHS, 9))

    def value(weights: Any) -> Any:
        return lb.lipsdp(lb.from_weights(weights, activation="relu")).value

    with pytest.raises(TypeError, match="lb.lipsdp.core"):
        jax.jit(value)(weights)
    with pytest.raises(TypeError, match="LureForm"):
        lb.lipsdp([np.eye(2)])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    layers = gauss(WIDTHS, 9)
    layers[1][2, 3] = bad
    with pytest.raises(ValueError, match=r"NaN|inf|finite"):
        lb.lipsdp(lb.from_weights(layers, activation="relu"))


# ------------------------------------------------------------------------ where the ellipsoid starts
@pytest.mark.slow
def test_every_start_is_sound_and_the_last_is_about_liplt() -> None:
    form, other = plain(), lb.liplt(plain()).value
    best = lb.lipsdp(form).value
    assert best < 0.9 * other
    values = []
    for start in range(len(form.taps) + 1):
        bound = lb.lipsdp(form, solver=lb.Recursion(start_at=start, iterations=300))
        assert slope().value / (1 + ROUNDING) <= bound.value <= other and bound.guarantee == "verified"
        assert bound.value >= best * (1 - NOT_BELOW), "better than the optimum"
        assert (start == 0) == (not any("the ellipsoid starts behind" in note for note in bound.notes))
        values.append(bound.value)
    assert values[0] <= best * (1 + ABOVE) and values[0] < values[1] < other
    assert values[-1] >= 0.98 * other, "all of it was bounded by LipLT"


# --------------------------------------------------------------------------------------- scaling
@pytest.mark.slow
@pytest.mark.parametrize("scales", [(1e-30, 1, 1), (1e30, 1, 1), (1e-9, 1e12, 1e-3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"solver": lb.Recursion(iterations=300)}, {"multipliers": "layer"}], ids=str
)
def test_the_sizes_of_the_layers_only_multiply(scales: tuple[float, ...], options: dict[str, Any]) -> None:
    one, other = scaled_by((1, 1, 1), options), scaled_by(scales, options)
    tolerance = 1e-2 if "solver" in options else 1e-6
    assert other.value == pytest.approx(one.value * math.prod(scales), rel=tolerance)
    assert one.pairwise is not None and other.pairwise is not None
    ratio = other.pairwise[FIRST, SECOND] / one.pairwise[FIRST, SECOND] / math.prod(scales)
    assert np.abs(ratio - 1).max() <= (0.2 if "solver" in options else 1e-6)


@pytest.mark.slow
def test_layers_sixty_orders_of_magnitude_apart() -> None:
    """Where the optimal multipliers have no proof in float64 the recursion steps in."""
    one, other = scaled_by((1, 1, 1), {}), scaled_by((1e30, 1e-30, 1e-8), {})
    assert 1 - NOT_BELOW <= other.value / (one.value * 1e-8) <= 1 + ABOVE


def scaled_by(scales: tuple[float, ...], options: dict[str, Any]) -> Any:
    layers = [s * w for s, w in zip(scales, gauss(WIDTHS, 9), strict=True)]
    return lb.lipsdp(lb.from_weights(layers, activation="relu"), pairwise=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_layer_of_zeros_makes_the_constant_0(dead: int) -> None:
    layers = gauss(WIDTHS, 9)
    layers[dead][:] = 0
    bound = lb.lipsdp(lb.from_weights(layers, activation="relu"), pairwise=True)
    assert bound.value == 0 and bound.pairwise is not None and not bound.pairwise.any()


@pytest.mark.parametrize("options", [{}, {"solver": lb.Recursion(iterations=30)}], ids=str)
def test_without_taps_it_is_the_norm_of_the_matrix(options: dict[str, Any]) -> None:
    (w,) = gauss([7, 5], 2)
    bound = lb.lipsdp(lb.from_weights([w], activation="relu"), pairwise=True, **options)
    assert bound.pairwise is not None
    exact = float(np.linalg.norm(w, 2))
    rows = np.linalg.norm(w[:, None] - w[None, :], axis=-1)
    assert exact * (1 - 1e-14) <= bound.value <= exact * (1 + 1e-6)
    assert (rows * (1 - 1e-14) <= bound.pairwise).all() and (bound.pairwise <= rows * (1 + 1e-6)).all()


def test_a_single_output_has_no_pairs() -> None:
    form = lb.from_weights(gauss([4, 8, 1], 3), activation="relu")
    bound = lb.lipsdp(form, pairwise=True)
    assert bound.pairwise is not None and bound.pairwise.shape == (1, 1) and bound.pairwise[0, 0] == 0
    assert bound.per_class is not None and bound.per_class[0] == pytest.approx(bound.value, rel=1e-6)
    assert bound.value < lb.liplt(form).value


# ------------------------------------------------------------------------------------ guarantees
@pytest.mark.slow
def test_guarantee_words() -> None:
    form = plain()
    best = lb.lipsdp(form, pairwise=True)
    assert type(best) is lb.UpperBound and best.guarantee == "verified" and best.failure_probability == 0
    assert lb.lipsdp(form, guarantee="verified").guarantee == "verified"
    likely = lb.lipsdp(form, guarantee="probabilistic")
    assert type(likely) is lb.UpperBound
    # the multipliers are proved by Cholesky; nothing in it was left to chance unless LipLT's norms are used
    assert (likely.guarantee == "probabilistic") == (likely.failure_probability > 0)
    assert likely.value >= best.value * (1 - NOT_BELOW)
    guess = lb.lipsdp(form, guarantee="estimate", pairwise=True)
    assert type(guess) is lb.Estimate and guess.guarantee == "estimate"
    assert guess.value == pytest.approx(best.value, rel=2e-3)
    assert guess.pairwise is not None and best.pairwise is not None
    assert (guess.pairwise >= best.pairwise * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"solver": lb.Recursion(iterations=0)},
        {"solver": lb.Recursion(iterations=15)},
        {"multipliers": "layer"},
    ],
    ids=str,
)
def test_never_above_liplt(options: dict[str, Any]) -> None:
    """Also entry by entry, and however badly the multipliers were optimised."""
    for kind in ("relu", "tanh", "prelu"):
        form = plain(kind)
        bound, other = lb.lipsdp(form, pairwise=True, **options), lb.liplt(form, pairwise=True)
        assert bound.value <= other.value
        assert bound.pairwise is not None and other.pairwise is not None
        assert bound.per_class is not None and other.per_class is not None
        assert (bound.pairwise <= other.pairwise).all() and (bound.per_class <= other.per_class).all()
    assert bound.value < other.value, "LipLT itself was returned"


def test_pairs_that_the_objective_leaves_out_are_those_of_liplt() -> None:
    """Outputs a thousand times apart: neither the network nor pair (0, 2) says anything about pair (0, 1)."""
    layers = gauss(WIDTHS, 9)
    layers[2][2] *= 1e3
    form = lb.from_weights(layers, activation="relu")
    weights = np.zeros((3, 3))
    weights[0, 2] = weights[2, 0] = 1.0
    bound, other = (
        lb.lipsdp(form, solver=lb.Recursion(objective=weights), pairwise=True),
        lb.liplt(form, pairwise=True),
    )
    assert bound.pairwise is not None and other.pairwise is not None
    assert bound.per_class is not None and other.per_class is not None
    assert (bound.pairwise <= other.pairwise).all() and (bound.per_class <= other.per_class).all()
    assert bound.pairwise[0, 1] == other.pairwise[0, 1] and bound.pairwise[0, 2] < other.pairwise[0, 2]


# ------------------------------------------------------------------------------- what it tells
def test_progress_is_called() -> None:
    seen: list[str] = []
    bound = lb.lipsdp(plain(seed=77), solver=lb.Recursion(iterations=300), progress=seen.append)
    values = [float(line.split()[-4]) for line in seen if " of at most 300 iterations" in line]
    assert len(values) > 1 and values[-1] == pytest.approx(bound.value, rel=1e-3)
    assert any(line.startswith("norm of input to ") for line in seen)
    seen.clear()
    exact = lb.lipsdp(plain(), progress=seen.append)
    assert seen[0].startswith("network: ")
    assert float(seen[0].split()[1]) == pytest.approx(exact.value, rel=1e-5)


def test_without_cvxpy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "lipbounds\[sdp\]"'):
        lb.lipsdp(plain(), solver="scs")
