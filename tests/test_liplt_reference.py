"""naive and LipLT against a NumPy transcription of the CRM paper, written from its text only.

Source: Fazlyab, Entesari, Roy, Chellappa, "Certified Robustness via Dynamic Margin Maximization and Improved
Lipschitz Regularization" (NeurIPS 2023): the network (17), Lemma 3.1 and Theorem 3.3, equation (19); the
naive bound is equation (13) repeated. Here the paper's alpha and beta are the smallest and the largest slope.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb

LEAKY = float(np.float32(0.01))
SLOPES = {"relu": (0.0, 1.0), "tanh": (0.0, 1.0), "leaky_relu": (LEAKY, 1.0)}
Matrix = np.ndarray
Norm = Callable[[Matrix], float]


@dataclass(frozen=True)
class Network:
    """y_k = W_k x_k, x_{k+1} = H_k x_k + G_k phi(y_k), k = 0 .. L-1; the output is W_L x_L, see (17)."""

    W: Sequence[Matrix]
    H: Sequence[Matrix]
    G: Sequence[Matrix]


def chain(weights: Sequence[Matrix]) -> Network:
    """x -> W_L phi(W_{L-1} ... phi(W_0 x)): the network (17) with H = 0 and G = I."""
    hidden = weights[:-1]
    return Network(
        weights,
        [np.zeros((w.shape[0], w.shape[1])) for w in hidden],
        [np.eye(w.shape[0]) for w in hidden],
    )


def product(matrices: Sequence[Matrix], size: int) -> Matrix:
    """matrices[-1] ... matrices[0]; the identity of this size for none (footnote 5)."""
    result = np.eye(size)
    for m in matrices:
        result = m @ result
    return result


def theorem_3_3(net: Network, alpha: float, beta: float, inner: Norm, last: Norm) -> float:
    """m_L of equation (19): `inner` is the induced norm, `last` the norm of the blocks into the output."""
    depth = len(net.H)
    centre, radius = (alpha + beta) / 2, (beta - alpha) / 2
    hat = [net.H[k] + centre * net.G[k] @ net.W[k] for k in range(depth)]
    m = [inner(net.W[0])]
    for k in range(depth):
        norm = last if k + 1 == depth else inner
        through = norm(net.W[k + 1] @ product(hat[: k + 1], net.W[0].shape[1]))
        taps = sum(
            norm(net.W[k + 1] @ product(hat[j + 1 : k + 1], net.G[j].shape[0]) @ net.G[j]) * m[j]
            for j in range(k + 1)
        )
        m.append(through + radius * taps)
    return m[-1]


def naive_bound(net: Network, alpha: float, beta: float, inner: Norm, last: Norm) -> float:
    """Theorem 3.3 without the loop transformation: centre 0 and radius max(|alpha|, |beta|).

    On a chain this is the product of the norms.
    """
    worst = max(abs(alpha), abs(beta))
    return theorem_3_3(net, -worst, worst, inner, last)


def induced(p: float) -> Norm:
    return lambda m: float(np.linalg.norm(m, p))


def row_norm(p: float) -> Norm:
    """Norm of a map into the real numbers: the dual norm of its row."""
    dual = {1: math.inf, 2: 2}.get(p, 1)
    return lambda m: float(np.linalg.norm(np.asarray(m).reshape(-1), dual))


def random_weights(rng: np.random.Generator, depth: int) -> list[np.ndarray]:
    """`depth` hidden layers between 7 inputs and 5 outputs, float32, with a positive mean now and then."""
    widths = [7, *rng.integers(4, 14, size=depth), 5]
    shift = rng.choice([0.0, 0.2])
    return [
        (rng.normal(size=(n_out, n_in)) / np.sqrt(n_in) + shift).astype(np.float32)
        for n_in, n_out in itertools.pairwise(widths)
    ]


def exact(weights: Sequence[np.ndarray]) -> list[Matrix]:
    return [w.astype(np.float64) for w in weights]


def same(value: float, truth: float) -> None:
    assert math.isclose(value, truth, rel_tol=1e-6), f"{value} against {truth} by the paper"
    assert value >= truth * (1 - 1e-12), "below the recursion of the paper"


@pytest.mark.sampled(7)
@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("activation", sorted(SLOPES))
def test_chains_equal_the_paper(depth: int, activation: str) -> None:
    rng = np.random.default_rng([depth, len(activation)])
    weights = random_weights(rng, depth)
    biases = [rng.normal(size=w.shape[0]).astype(np.float32) for w in weights]
    form = lb.from_weights(weights, biases=biases, activation=activation)
    net, (alpha, beta) = chain(exact(weights)), SLOPES[activation]
    for p in (2, 1, math.inf):
        naive = naive_bound(net, alpha, beta, induced(p), induced(p))
        liplt = theorem_3_3(net, alpha, beta, induced(p), induced(p))
        same(lb.naive(form, norm=p).value, naive)
        same(lb.liplt(form, norm=p).value, min(naive, liplt))
        if p == 2:
            norms = [np.linalg.norm(w, 2) for w in exact(weights)]
            assert math.isclose(naive, beta**depth * math.prod(norms), rel_tol=1e-12)
            assert liplt <= naive * (1 + 1e-12)


@pytest.mark.parametrize("p", [2, 1, math.inf])
@pytest.mark.parametrize("depth", [1, 3])
def test_pairs_and_classes_equal_the_paper(p: float, depth: int) -> None:
    """L_ij is the same recursion with the output matrix replaced by the row w_i - w_j, in the dual norm."""
    weights = random_weights(np.random.default_rng(depth), depth)
    form = lb.from_weights(weights, activation="relu")
    naive, liplt = lb.naive(form, norm=p, pairwise=True), lb.liplt(form, norm=p, pairwise=True)
    assert naive.pairwise is not None and liplt.pairwise is not None
    assert naive.per_class is not None and liplt.per_class is not None
    *hidden, last = exact(weights)
    for i in range(5):
        one = chain([*hidden, last[i : i + 1]])
        simple = naive_bound(one, 0.0, 1.0, induced(p), row_norm(p))
        same(float(naive.per_class[i]), simple)
        same(float(liplt.per_class[i]), min(simple, theorem_3_3(one, 0.0, 1.0, induced(p), row_norm(p))))
        for j in range(i):
            two = chain([*hidden, (last[i] - last[j])[None]])
            simple = naive_bound(two, 0.0, 1.0, induced(p), row_norm(p))
            same(float(naive.pairwise[i, j]), simple)
            same(
                float(liplt.pairwise[i, j]), min(simple, theorem_3_3(two, 0.0, 1.0, induced(p), row_norm(p)))
            )


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_residual_networks_equal_the_paper(blocks: int, activation: str) -> None:
    """x + G phi(W x), repeated, then a dense layer: (19) with H = I; naive stays below (13)."""
    rng = np.random.default_rng(blocks)
    n, phi = 6, {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    inside = [(rng.normal(size=(8, n)) / 3).astype(np.float32) for _ in range(blocks)]
    outside = [(rng.normal(size=(n, 8)) / 3).astype(np.float32) for _ in range(blocks)]
    head = (rng.normal(size=(4, n)) / 2).astype(np.float32)

    def fn(x: jax.Array) -> jax.Array:
        for w, g in zip(inside, outside, strict=True):
            x = x + jnp.asarray(g) @ phi(jnp.asarray(w) @ x + 0.1)
        return jnp.asarray(head) @ x

    form = lb.trace(fn, jnp.zeros(n))
    net = Network([*exact(inside), head.astype(np.float64)], [np.eye(n)] * blocks, exact(outside))
    two = induced(2)
    same(lb.liplt(form).value, theorem_3_3(net, 0.0, 1.0, two, two))
    naive = lb.naive(form).value
    same(naive, naive_bound(net, 0.0, 1.0, two, two))
    textbook = two(net.W[-1]) * math.prod(1 + two(g) * two(w) for g, w in zip(net.G, net.W, strict=False))
    assert naive <= textbook * (1 + 1e-9)


def test_theorem_3_2_aol_is_not_above_the_paper() -> None:
    """One hidden layer, T of AOL (equation (16)): the scaled recursion is at most the paper's L_LT(T)."""
    rng = np.random.default_rng(4)
    weights = random_weights(rng, 1)
    w, g = exact(weights)
    gram = np.abs(g.T @ g).sum(axis=1)
    paper = np.linalg.norm(0.5 * g @ w, 2) + 0.5 * np.linalg.norm(w.T @ np.diag(gram) @ w, 2) ** 0.5
    value = lb.liplt(lb.from_weights(weights, activation="relu"), scaling="aol").value
    assert value <= paper * (1 + 1e-6)
    # the scaled recursion by hand, ||g w / 2|| + ||g S^-1|| ||S w|| / 2 with S = T^(1/2)
    s = np.sqrt(gram)
    scaled = np.linalg.norm(0.5 * g @ w, 2) + 0.5 * np.linalg.norm(g / s, 2) * np.linalg.norm(
        s[:, None] * w, 2
    )
    unscaled = theorem_3_3(chain([w, g]), 0.0, 1.0, induced(2), induced(2))
    assert math.isclose(value, scaled, rel_tol=1e-6) or math.isclose(
        value, min(scaled, unscaled), rel_tol=1e-6
    )


def test_the_reference_itself_by_hand() -> None:
    """x -> 2 relu(3 x), slopes [0, 1]: naive 6, LipLT |2 * 0.5 * 3| + 0.5 * 2 * 3 = 6; leaky 0.5: also 6."""
    net = chain([np.array([[3.0]]), np.array([[2.0]])])
    two = induced(2)
    assert naive_bound(net, 0.0, 1.0, two, two) == 6.0
    assert theorem_3_3(net, 0.0, 1.0, two, two) == 6.0
    assert theorem_3_3(net, 0.5, 1.0, two, two) == 6.0
    # two neurons that pull against each other: relu(x) - relu(-x) = x, which the centre sees in part
    both = chain([np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])])
    assert math.isclose(naive_bound(both, 0.0, 1.0, two, two), 2.0)
    assert math.isclose(theorem_3_3(both, 0.0, 1.0, two, two), 2.0)
    # and two that cancel: relu(x) + relu(-x) = |x|
    cancel = chain([np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]])])
    assert math.isclose(theorem_3_3(cancel, 0.0, 1.0, two, two), 1.0)
