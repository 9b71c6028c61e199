"""Proofs on an accelerator, with the CPU in its place: few programs, compiled ahead from the shapes alone."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from stand_in import stand_in

import lipbounds as lb
from lipbounds._form.steps import KINDS, StaticArray
from lipbounds._gain import device_blocks, step_matrices
from lipbounds._gain.convolution import convolution
from lipbounds._norms import device as proofs
from lipbounds._norms import device_lanczos
from lipbounds._triangle.rehearsal import compile_ahead

__all__ = ["stand_in"]  # a fixture of every test here


@contextmanager
def compilations() -> Iterator[collections.Counter[str]]:
    """The compilations inside, by the name of what is compiled where JAX tells it."""
    found: collections.Counter[str] = collections.Counter()

    def heard(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found[str(more.get("fun_name", ""))] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def network(seed: int, height: int = 5) -> lb.LureForm:
    """Convolutions of stride 1 and 2 with a branch beside them, and two dense layers."""
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal(s).astype(np.float32) for s in ((3, 3, 1, 3), (3, 3, 3, 3), (4, 4, 3, 5))]
    hidden = rng.standard_normal((height // 2 * 2 * 5, 9)).astype(np.float32)
    last = rng.standard_normal((9, 3)).astype(np.float32)

    def conv(x: jax.Array, kernel: np.ndarray, stride: int) -> jax.Array:
        sizes = ((stride, stride), ((1, 1), (1, 1)))
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x[None], kernel, *sizes, dimension_numbers=numbers)[0]

    def model(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(x, kernels[0], 1))
        x = jnp.concatenate([jax.nn.relu(conv(x, kernels[1], 1)), x], axis=0)[:height]
        x = jax.nn.relu(conv(x, kernels[2], 2))
        return jax.nn.relu(x.ravel() @ hidden) @ last

    return lb.trace(model, jax.ShapeDtypeStruct((height, 5, 1), jnp.float32))


def test_after_the_rehearsal_nothing_is_compiled_and_the_bound_is_the_same() -> None:
    with compilations() as first:
        compile_ahead(network(0))
    other = network(1)
    with compilations() as again:
        bound = lb.liplt(other, pairwise=True)
    assert first.total() > 10
    assert not again
    assert {part.how for part in bound.parts} >= {"residual on a GPU"}
    host = lb.liplt(network(1), pairwise=True, device="cpu")
    assert bound.pairwise == pytest.approx(host.pairwise, rel=1e-9)


def test_the_rehearsal_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Any:
        raise AssertionError("a product was computed")

    monkeypatch.setattr(proofs, "norm_bound", run)
    monkeypatch.setattr(device_blocks.DeviceForm, "put", run)
    compile_ahead(network(0, height=6))


def test_without_an_accelerator_nothing_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    form = network(0, height=7)
    with compilations() as found:
        compile_ahead(form)
    assert not found or jax.default_backend() == "gpu"


# --- the parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.5, 1e-4, 0.0])
def test_the_estimate_of_the_top_eigenvalue(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Well separated, close together and double, of a matrix in tiles whose last rows are padding."""
    n, side = 300, 64
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.concatenate([[2.0, 2.0 - gap], rng.uniform(0.0, 1.9, n - 2)])
    g = np.zeros((320, 320))
    g[:n, :n] = (q * values) @ q.T
    monkeypatch.setattr(proofs, "TILE", side)
    device = jax.devices("cpu")[0]
    with proofs.exactly():
        tiles = {
            (i, j): jax.device_put(g[i * side : (i + 1) * side, j * side : (j + 1) * side], device)
            for j in range(5)
            for i in range(j + 1)
        }
        found = device_lanczos.top_eigenvalue(tiles, 320, device, tol=1e-10)
    assert found == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "numbers"),
    [
        ((1, 1), ((1, 1), (1, 1)), (1, 1), ("NHWC", "HWIO", "NHWC")),
        ((2, 2), ((1, 1), (1, 1)), (1, 1), ("NHWC", "HWIO", "NHWC")),
        ((2, 1), ((0, 2), (1, 0)), (1, 1), ("NCHW", "OIHW", "NCHW")),
        ((1, 1), ((1, 1), (2, 1)), (2, 1), ("NHWC", "HWIO", "NCHW")),
    ],
)
def test_rows_of_a_convolution(strides: Any, padding: Any, dilation: Any, numbers: Any) -> None:
    shape = (1, 7, 6, 3) if numbers[0] == "NHWC" else (1, 3, 7, 6)
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 5) if numbers[1] == "HWIO" else (5, 3, 4, 3))
    options = dict(window_strides=strides, padding=padding, lhs_dilation=dilation, dimension_numbers=numbers)
    (step,) = jax.make_jaxpr(lambda x: lax.conv_general_dilated(x, kernel, **options))(jnp.zeros(shape)).eqns
    map_ = convolution(step.params, shape, kernel, step.outvars[0].aval.shape)
    for each in (map_, map_.transposed):
        found = each.by_rows()
        assert found is not None
        whole = np.zeros(each.shape)
        np.add.at(whole, (np.arange(len(found[0]))[:, None], found[1]), found[0])
        assert (whole == each(np.eye(each.shape[1]))).all()


MOVES: dict[str, tuple[dict[str, Any], int]] = {
    "reshape": ({"shape": (4, 6)}, 1),
    "transpose": ({"permutation": (2, 0, 1)}, 1),
    "rev": ({"dimensions": (0, 2)}, 1),
    "tile": ({"reps": (1, 2, 3)}, 1),
    "stack": ({"axis": 1}, 2),
    "concatenate": ({"dimension": 2}, 2),
    "broadcast_in_dim": ({"shape": (5, 2, 3, 7, 4), "dims": (1, 2, 4)}, 1),
    "take": ({"index": StaticArray(np.array([[3, -1], [0, 40]]))}, 2),
}


@pytest.mark.parametrize("strides", [None, (1, 2, 3)])
def test_moves_in_numpy_are_those_of_jax(strides: Any) -> None:
    moves = MOVES | {"slice": ({"start": (0, 1, 0), "limit": (2, 3, 4), "strides": strides}, 1)}
    assert moves.keys() == step_matrices._IN_NUMPY.keys()
    for kind, (params, count) in moves.items():
        arrays = [np.arange(k, k + 24, dtype=np.int32).reshape(2, 3, 4) for k in range(1, 25 * count, 24)][
            :count
        ]
        expected = KINDS[kind].apply(params, *map(jnp.asarray, arrays))
        assert np.array_equal(step_matrices._IN_NUMPY[kind](params, *arrays), expected), kind


def test_broadcasts_of_ones_and_along_other_axes() -> None:
    for shape, dims in (((1, 3), (0, 2)), ((3, 1), (1, 2)), ((), ())):
        params = {"shape": (2, 3, 3), "dims": dims}
        a = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
        expected = KINDS["broadcast_in_dim"].apply(params, jnp.asarray(a))
        assert np.array_equal(step_matrices._IN_NUMPY["broadcast_in_dim"](params, a), expected)


def test_rows_in_steps() -> None:
    values = np.arange(1.0, 3 * 11 + 1).reshape(3, 11)
    columns = np.arange(33, dtype=np.int32).reshape(3, 11)
    steps, places = device_blocks._in_steps(values, columns)
    assert steps.shape == places.shape == (2, 3, 8)
    rows = itertools.chain.from_iterable(
        zip(steps[s].ravel(), places[s].ravel(), strict=True) for s in range(2)
    )
    assert sorted(pair for pair in rows if pair[0]) == [(k + 1.0, k) for k in range(33)]
