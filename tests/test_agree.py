"""The value check after tracing: points of every size, the corners of a box, and rounding told apart from mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._tracing import jaxpr, rules, value_check

Fn = Callable[[jax.Array], Any]
X = jnp.ones(3)


def _as_zeros(self: Any, eqn: Any, inputs: list[jaxpr.Value], path: Any) -> list[jaxpr.Value]:
    """`x.at[i].apply(f)` taken for a scatter of its operands, as it once was."""
    params = {**eqn.params, "update_jaxpr": None}
    out = self.value(inputs[0].shape, inputs[0].dtype, depends=True)
    record = jaxpr.Eqn("scatter", params, tuple(inputs), (out,), "")
    record.bind = lambda *args, **_: eqn.primitive.bind(*args, **eqn.params)
    out.producer = record
    self.eqns.append(record)
    return [out]


def kinked(x: jax.Array) -> jax.Array:
    h = x.at[0].apply(lambda a: 50.0 * jax.nn.relu(a - 128.0))
    return jnp.stack([h[0] + h[1], h[2] + 10.0])


def test_a_mistake_that_shows_far_out_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value check saw nothing of it as long as its points were of size 1 and 10."""
    monkeypatch.setattr(jaxpr._Inliner, "apply_at", _as_zeros)
    with pytest.raises(RuntimeError, match="a random point of size 100"):
        lb.trace(kinked, X)


def test_a_mistake_at_the_corners_of_the_box_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxpr._Inliner, "apply_at", _as_zeros)
    monkeypatch.setattr(value_check, "_SIZES", ())
    lb.trace(kinked, X)
    lb.trace(kinked, X, box=(0.0, 100.0))
    box = (0.0, np.array([255.0, 1.0, 1.0]))
    with pytest.raises(RuntimeError, match="a corner of the box"):
        lb.trace(kinked, X, box=box)
    with pytest.raises(RuntimeError, match="a corner of the box"):
        lb.trace(lambda x: jnp.stack([kinked(row) for row in x]), jnp.ones((2, 3)), batched=True, box=box)


@pytest.mark.parametrize("box", [(1.0, 0.0), 3.0, (0.0, np.ones(2)), (np.nan, 1.0)])
def test_what_is_no_box_is_refused(box: Any) -> None:
    with pytest.raises(ValueError, match="box must be"):
        lb.trace(lambda x: 2.0 * x, X, box=box)


def test_a_wrong_rule_is_still_called_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = rules.Linear("cumsum", {"axis": 0, "reverse": False}, (0,))
    monkeypatch.setitem(rules.RULES, "cumsum", lambda eqn: wrong)
    with pytest.raises(RuntimeError, match="bug of lipbounds"):
        lb.trace(lambda x: lax.cumsum(x, reverse=True), X)


def test_a_function_that_is_not_pure_is_still_found() -> None:
    calls: list[int] = []

    def fn(x: jax.Array) -> jax.Array:
        calls.append(1)
        return x * len(calls)

    with pytest.raises(RuntimeError, match="not a pure function"):
        lb.trace(fn, X)


def cancelling(scale: float) -> Fn:
    return lambda x: jnp.ones((2, 4)) @ jax.nn.relu((scale * x + jnp.float32(0.1) * x) - scale * x)


@pytest.mark.parametrize("scale", [1e8, 1e12])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["", "jit"])
def test_cancellation_is_said_to_be_rounding(
    scale: float, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be called a bug of lipbounds. XLA rounds the form in another way than the program when it fuses."""

    def fused(form: lb.LureForm, x: jax.Array, dtype: Any) -> dict[int, Any]:
        with jax.enable_x64(True):
            found = value_check._one_by_one(form, jnp.asarray(x, jnp.float64), jnp.float64)
            return {r: value.astype(dtype) for r, value in found.items()}

    monkeypatch.setattr(value_check, "_registers", fused)
    with pytest.raises(lb.UnsupportedError, match="loses its digits in float32") as caught:
        lb.trace(wrap(cancelling(scale)), jnp.ones(4))
    (item,) = caught.value.items
    assert item.shape == (4,) and "float64" in item.remedy and "rescale" in item.remedy
    assert "rounding errors reach" in item.reason and "bug" not in str(caught.value)


def test_cancellation_with_the_optimiser_of_xla() -> None:
    """The suite switches it off; with it, form and program differ by themselves."""
    code = (
        "import jax, jax.numpy as jnp, lipbounds as lb\n"
        "for c in (1e12, 1e16):\n"
        "    f = lambda x: jnp.ones((2, 4)) @ jax.nn.relu((c * x + jnp.float32(0.1) * x) - c * x)\n"
        "    try: lb.trace(f, jnp.ones(4))\n"
        "    except lb.UnsupportedError as error: print('refused:', error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("refused:") == done.stdout.count("loses its digits in float32") == 2


def test_the_remedy_for_cancellation_works() -> None:
    with jax.enable_x64(True):
        a = 0.1

        def fn(x: jax.Array) -> jax.Array:
            return jnp.ones((2, 4)) @ jax.nn.relu((1e6 * x + a * x) - 1e6 * x)

        form = lb.trace(fn, jnp.ones(4, jnp.float64))
        exact = a * np.sqrt(8)
        assert exact <= lb.liplt(form).value <= exact * 1.01


@pytest.mark.parametrize(
    ("fn", "dtype"),
    [
        (lambda x: jnp.sin(1e3 * x), "float32"),
        (lambda x: jax.nn.relu(x.astype(jnp.bfloat16) * 3).astype(jnp.float32), "float32"),
        (lambda x: jnp.float16(300.0) * jax.nn.relu(x), "float16"),
        (lambda x: jax.nn.mish(x) + jax.nn.silu(x) + jax.nn.gelu(x), "float32"),
        (lambda x: jax.nn.relu(x + 1e4) - 1e4, "float32"),
    ],
    ids=["fast sine", "bfloat16", "overflow of float16", "smooth", "offset"],
)
def test_rounding_far_out_is_no_alarm(fn: Fn, dtype: str) -> None:
    assert lb.trace(fn, jnp.ones(4, dtype)).num_outputs == 4
