"""The flat program run at concrete inputs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds._tracing.flat import Flat, Value


def run(flat: Flat, x: Any, double: bool = False) -> dict[int, Any]:
    """The flat program at one concrete input, equation by equation as jax executes it: {value index: tensor}.

    Products are computed in the precision of their operands: by default a GPU would round float32 to TF32. With
    `double` (where float64 is enabled) every float is a float64, and casts between floats do nothing.
    """
    found: dict[int, Any] = {flat.input.index: x}

    def read(value: Value) -> Any:
        if value.depends:
            return found[value.index]
        wide = double and jnp.issubdtype(value.dtype, jnp.floating)
        return jnp.asarray(value.const, jnp.float64) if wide else value.const

    for eqn in flat.eqns:
        inputs = [read(v) for v in eqn.inputs]
        if double and eqn.primitive == "scatter-add":
            p = eqn.params
            operand, indices, updates = map(jnp.asarray, inputs)
            results = [lax.scatter_add(operand, indices, updates, p["dimension_numbers"], mode=p["mode"])]
        elif double and eqn.primitive == "reduce_precision":
            results = inputs
        elif eqn.bind is not None:
            params = _widened(eqn.params) if double else eqn.params
            if "precision" in params:
                params = {**params, "precision": lax.Precision.HIGHEST}
            out = eqn.bind(*inputs, **params)
            results = out if eqn.many else [out]
        elif eqn.primitive == "concatenate":
            results = [lax.concatenate([jnp.asarray(v) for v in inputs], eqn.params["dimension"])]
        elif eqn.primitive == "slice":
            results = [lax.slice(inputs[0], eqn.params["start_indices"], eqn.params["limit_indices"])]
        else:
            results = [lax.reshape(inputs[0], eqn.params["new_sizes"])]
        found.update((value.index, result) for value, result in zip(eqn.outputs, results, strict=True))
    return found


def _widened(params: dict[str, Any]) -> dict[str, Any]:
    names = ("new_dtype", "preferred_element_type", "out_dtype")
    wide = {k for k in names if params.get(k) is not None and jnp.issubdtype(params[k], jnp.floating)}
    return {k: np.dtype(np.float64) if k in wide else v for k, v in params.items()}
