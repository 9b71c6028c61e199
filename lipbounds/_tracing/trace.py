"""`trace`: the Lur'e form (linear maps and activation layers) of a JAX function, and checks of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._form.concrete import is_concrete
from lipbounds._form.inputs import check_box
from lipbounds._form.lure import Arrays, LureForm, apply_op, check_weights
from lipbounds._form.precision import TOO_NARROW, half_or_wider
from lipbounds._form.program import Op
from lipbounds._form.steps import KINDS
from lipbounds._form.walk import walk
from lipbounds._text.calls import usual_floats
from lipbounds._text.settings import debugging_off
from lipbounds._tracing.doors import check_example, check_function, check_layers, explained
from lipbounds._tracing.flat import Flat
from lipbounds._tracing.jaxpr import flatten
from lipbounds._tracing.lowering import Lowering, lower
from lipbounds._tracing.modules import CHANGED, Function, split
from lipbounds._tracing.value_check import Traced, check_values
from lipbounds.errors import Unsupported, UnsupportedError

_NOT_ELEMENTWISE = "register_activation needs an elementwise function of one tensor"


@usual_floats
@debugging_off()
def trace(
    fn: Callable[..., Any], x: Any, *, batched: bool = False, box: tuple[Any, Any] | None = None
) -> LureForm:
    """The Lur'e form of a network.

    Units: the bounds and radii of the form are in the units of `fn`'s input. Put the normalisation of the data inside
    `fn` and radii come out in raw pixels.

    Args:
        fn: one example -> outputs of shape (K,) (with `batched`: a batch -> a batch of outputs, (B, ...) -> (B, K)).
            A plain function, a flax nnx module (split; never mutated), or anything callable. Parameters it closes over
            may be tracers.
        x: an example (with `batched`: a batch): an array, or a `jax.ShapeDtypeStruct`.
        batched: raise an error if the output of one row depends on another row.
        box: (lower, upper) of the inputs, numbers or arrays of the shape of an example. The form is for all of R^n
            whatever it is; its corners are among the points where form and function are compared.

    Raises:
        UnsupportedError: lists all operations without a Lipschitz bound, with remedies.
        TypeError: `fn` is not callable or x is not an array.
        ValueError: weights that are not finite, or an output that is not one vector.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lipbounds as lb
        >>> W = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> lb.trace(lambda x: W @ jax.nn.relu(W @ x), jnp.zeros(2))
        LureForm((2,) -> (2,), 1 tap: relu[2], 2 neurons)
    """
    check_function(fn)
    spec = _spec(x)
    if batched and not spec.shape:
        raise ValueError("batched=True needs an input with a leading batch axis")
    one = jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype) if batched else spec
    called: list[Any] = []
    call, params = split(fn, called)

    def single(p: Any, v: Any) -> Any:
        return _row(call(p, v[None])) if batched else call(p, v)

    with explained(fn, spec) if not batched else nullcontext():
        form, traced = _form(single, params, one)
    if batched:
        _check_rows(call, params, spec, form)
    check_values(form, traced, lambda v: single(params, v), one, _corners(box, one))
    _check_again(form, called, batched, one)
    return form


@usual_floats
@debugging_off()
def from_weights(
    weights: Sequence[Any],
    biases: Sequence[Any | None] | None = None,
    activation: str | Callable[..., Any] = "relu",
    slopes: Sequence[tuple[Any, Any]] | None = None,
) -> LureForm:
    """The form of z = W_L phi(... phi(W_0 x + b_0) ...) + b_L.

    Args:
        weights: matrices of shape (out, in), in order.
        biases: vectors, None for a layer without one, or None.
        activation: a function of one tensor, or its name in `jax.nn`.
        slopes: instead of `activation`, per hidden layer (lower, upper) slopes, scalars or one per neuron: the network
            certified has phi(y) = lower * y for y < 0 and upper * y for y >= 0.

    No number is rounded: the network has the dtype of the weights if that holds every weight, bias and slope exactly,
    else float64.

    Raises:
        ValueError: shapes that do not chain, weights that are not finite, slopes with lower > upper, or numbers that
            float64 does not hold exactly.

    Example:
        >>> import lipbounds as lb
        >>> lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0]]], activation="tanh")
        LureForm((2,) -> (1,), 1 tap: tanh[2], 2 neurons)
    """
    matrices = [w if isinstance(w, jax.Array) else np.asarray(w) for w in weights]
    check_layers(matrices, biases, slopes)
    if isinstance(activation, str):
        named = getattr(jax.nn, activation, None) or getattr(jnp, activation, None)
        if not callable(named):
            raise ValueError(f"no activation called {activation!r} in jax.nn or jax.numpy; pass a function")
        activation = named
    numbers = {f"weights[{i}]": w for i, w in enumerate(matrices)}
    numbers |= {f"biases[{i}]": b for i, b in enumerate(biases or ()) if b is not None}
    numbers |= {f"slopes[{i}][{j}]": pair[j] for i, pair in enumerate(slopes or ()) for j in (0, 1)}
    dtype = _exact_dtype(matrices, numbers)
    for i, pair in enumerate(slopes or ()):
        ends = [np.asarray(end).astype(np.float64) for end in pair if is_concrete(end)]
        if len(ends) == 2 and np.any(ends[0] > ends[1]):
            raise ValueError(f"slopes[{i}] must be (lower, upper) with lower <= upper")

    function: Any = activation

    def hidden(k: int, y: Any) -> Any:
        if slopes is None:
            return function(y)
        low, high = (_cast(s, y.dtype) for s in slopes[k])
        return jnp.where(y < 0, low * y, high * y)

    def network(params: Any, x: Any) -> Any:
        for k, (w, b) in enumerate(params):
            x = w @ x if b is None else w @ x + b
            x = hidden(k, x) if k < len(params) - 1 else x
        return x

    offsets = biases if biases is not None else [None] * len(matrices)
    with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
        params = [
            (_cast(w, dtype), None if b is None else _cast(b, dtype))
            for w, b in zip(matrices, offsets, strict=True)
        ]
        spec = jax.ShapeDtypeStruct((int(np.shape(matrices[0])[1]),), dtype)
        form, traced = _form(network, params, spec)
        check_values(form, traced, lambda v: network(params, v), spec)
    return form


@usual_floats
@debugging_off()
def register_activation(fn: Callable[[Any], Any], slopes: tuple[float, float]) -> Callable[[Any], Any]:
    """Declare the slope interval of an elementwise function whose range this library cannot prove.

    Bounds that use it carry the guarantee "assumed". The function is recognised by its structure and its constants
    wherever it is traced, in float32, float64 and half precision. There its constants are rounded and the slopes are
    not, so leave them room for that.

    Args:
        fn: an elementwise function of one tensor.
        slopes: (a, b) with a <= (fn(x) - fn(y)) / (x - y) <= b for all real x != y.

    Returns:
        `fn`, so that this can be used with `functools.partial` as a decorator.

    Raises:
        ValueError: `fn` is not an elementwise function of one variable, or slopes are not two numbers with a <= b.

    Example:
        >>> import jax.numpy as jnp
        >>> import lipbounds as lb
        >>> act = lb.register_activation(lambda x: jnp.sinh(jnp.clip(x, -1, 1)), slopes=(0.0, 1.55))  # cosh(1) = 1.543
        >>> bound = lb.naive(lb.trace(lambda x: act(x), jnp.zeros(2)))
        >>> round(bound.value, 6), bound.guarantee
        (1.55, 'assumed')
    """
    if not callable(fn):
        raise TypeError(f"register_activation needs a function, got {type(fn).__name__}")
    try:
        low, high = (float(s) for s in slopes)
    except (TypeError, ValueError):
        low = high = np.nan
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"slopes must be two finite numbers (a, b) with a <= b, got {slopes!r}")
    failures: list[Exception] = []
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
    for dtype in dtypes:
        with jax.enable_x64(True) if dtype == jnp.float64 else nullcontext():
            try:
                flat = flatten(lambda _, v: fn(v), (), jax.ShapeDtypeStruct((3,), dtype))
            except Exception as error:  # it may be meant for one dtype alone
                failures.append(error)
                continue
            lowering = Lowering(flat)
            output = lowering.resolve(flat.outputs[0]) if len(flat.outputs) == 1 else None
            if output is None or output.shape != (3,) or not output.depends:
                raise ValueError(_NOT_ELEMENTWISE)
            found = [region for base, region, _ in lowering.dominators(output) if base is flat.input]
            if not found or not jnp.issubdtype(output.dtype, jnp.floating):
                raise ValueError(_NOT_ELEMENTWISE)
            expr, consts = lowering.expression(output, flat.input, found[-1])
            activations.register(expr, [np.asarray(c.const) for c in consts], low, high)
    if len(failures) == len(dtypes):
        reason = str(failures[0]).partition("\n")[0]
        raise ValueError(
            f"{_NOT_ELEMENTWISE}; called with one of shape (3,) it failed: {reason}"
        ) from failures[0]
    return fn


# --- helpers -------------------------------------------------------------------------------------------------------


def _exact_dtype(weights: Sequence[Any], numbers: Mapping[str, Any]) -> np.dtype:
    """The float type that holds all `numbers` (name -> array) exactly: that of the weights, else float64.

    Arrays that are being traced count with their dtype. Weights of a float8 type are computed with in float32.
    """
    names = {np.dtype(w.dtype).name for w in weights}
    only = names.pop() if len(names) == 1 else "float64" if "float64" in names else "float32"
    narrow = np.dtype(jnp.dtype(only if only in ("bfloat16", "float16", "float64") else "float32"))
    if all(_exact_in(value, narrow) for value in numbers.values()):
        return narrow
    for name, value in numbers.items():
        if not _exact_in(value, np.dtype(np.float64)):
            raise ValueError(
                f"{name} holds a number that float64 cannot represent exactly, and a bound of the network with rounded "
                "numbers is not one of this network: round them to float64 first, if that is what you mean"
            )
    return np.dtype(np.float64)


def _exact_in(value: Any, dtype: np.dtype) -> bool:
    """Whether `dtype` holds every real number of `value`."""
    if not is_concrete(value):
        if jnp.issubdtype(value.dtype, jnp.floating):
            return bool(jnp.promote_types(value.dtype, dtype) == dtype)
        return value.dtype == np.bool_ or jnp.iinfo(value.dtype).bits <= jnp.finfo(dtype).nmant + 1
    array = np.asarray(value)
    if array.dtype in (np.bool_, dtype):
        return True
    if array.dtype.kind in "iuO":  # Python compares an integer or a Fraction with a float exactly
        try:
            floats = [float(v) for v in array.ravel().tolist()]
            if any(f != v for f, v in zip(floats, array.ravel().tolist(), strict=True)):
                return False
        except (TypeError, ValueError, OverflowError):
            return False
        array = np.array(floats, np.float64)
    if array.dtype.kind == "c":
        return False
    with np.errstate(all="ignore"):
        return bool(np.array_equal(array.astype(dtype).astype(array.dtype), array, equal_nan=True))


def _cast(value: Any, dtype: np.dtype) -> Any:
    """`value` as a jax array; concrete numbers are converted by NumPy, so that nothing passes through float32."""
    return jnp.asarray(np.asarray(value).astype(dtype) if is_concrete(value) else value, dtype)


def _refusal(primitive: str, shape: Sequence[int], reason: str, remedy: str) -> UnsupportedError:
    return UnsupportedError((Unsupported(primitive, "", tuple(shape), reason, remedy),))


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    check_example(x)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        kind = "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "integer or boolean"
        remedy = "cast it to a float: x.astype(jnp.float32)"
        raise _refusal("input", x.shape, f"the input is {kind} ({dtype})", remedy)
    if not half_or_wider(dtype):
        reason, remedy = TOO_NARROW
        raise _refusal("input", x.shape, reason.format(name=dtype.name), remedy)
    return jax.ShapeDtypeStruct(tuple(x.shape), dtype)


def _corners(box: Any, spec: jax.ShapeDtypeStruct) -> tuple[np.ndarray, np.ndarray] | None:
    return check_box(box, np.zeros((0, *spec.shape)))


def _check_again(form: LureForm, called: Sequence[Any], batched: bool, spec: jax.ShapeDtypeStruct) -> None:
    """UnsupportedError where a module that an input has gone through has another form, by more than rounding.

    SpectralNorm divides its weights in place, so its calls differ by roundings in evaluation mode, too.
    """
    if not called or form.is_traced:
        return
    call, params = split(called[0], [])
    again, _ = _form((lambda p, v: _row(call(p, v[None]))) if batched else call, params, spec)
    same = form.program == again.program and len(form.consts) == len(again.consts)
    if not (same and all(map(_rounded_alike, form.consts, again.consts))):
        raise _refusal("output", spec.shape, *CHANGED)


def _rounded_alike(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return bool((a == b).all())
    eps = float(jnp.finfo(a.dtype).eps)
    few = min(16 * eps, max(2 * eps, 0.01))
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.abs(a - b).max(initial=0.0) <= few * np.abs(a).max(initial=0.0))


def _row(out: Any) -> Any:
    out = one_array(out)
    if out.ndim < 1 or out.shape[0] != 1:
        raise ValueError(
            f"batched=True: a batch of one gave an output of shape {out.shape}; its first axis must be the batch"
        )
    return out[0]


def one_array(out: Any) -> Any:
    """The output of a function, which must be one array; ValueError that names what it is instead."""
    if hasattr(out, "shape") and hasattr(out, "dtype"):
        return out
    if isinstance(out, (bool, int, float, np.generic)):
        return jnp.asarray(out)
    leaves, _ = jax.tree_util.tree_flatten_with_path(out)
    if isinstance(out, str) or not leaves:
        raise ValueError(f"the function must return one array of shape (K,), it returned {_brief(out)}")
    places = [jax.tree_util.keystr(path) for path, _ in leaves]
    place = next((p for p in places if "logit" in p.lower()), places[0])
    inside = f"{_brief(out)} with {', '.join(places[:6])}{', ...' if len(places) > 6 else ''}"
    raise ValueError(
        f"the function must return one array of shape (K,), it returned a {inside}: choose what to bound, "
        f"for example `lambda x: fn(x){place}`"
    )


def _brief(out: Any) -> str:
    return "a string" if isinstance(out, str) else "None" if out is None else type(out).__name__


def _flatten(call: Function, params: Any, spec: jax.ShapeDtypeStruct) -> Flat:
    try:
        return flatten(lambda p, v: one_array(call(p, v)), params, spec)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        reason = str(error).splitlines()[0]
        remedy = (
            "use jnp.where, lax.select or a tensor operation in place of a Python decision on values of x"
        )
        reason = f"Python needs the value of x: {reason}"
        raise _refusal("python control flow", spec.shape, reason, remedy) from error


def _form(call: Function, params: Any, spec: jax.ShapeDtypeStruct) -> tuple[LureForm, Traced]:
    flat = _flatten(call, params, spec)
    (output,) = flat.outputs
    if len(output.shape) > 1:
        raise ValueError(
            f"the function must return one vector of shape (K,), it returned shape {output.shape}: pass one example "
            "such as X[0], or a batch with batched=True; if that is the output of one example, trace "
            "lambda x: fn(x).ravel()"
        )
    if not jnp.issubdtype(output.dtype, jnp.floating) and not output.depends:
        raise ValueError(f"the function must return floating point numbers, it returned {output.dtype}")
    if 0 in output.shape:
        raise ValueError("the function must return at least one number, it returned an empty vector")
    program, leaves, slopes, registers = lower(flat)
    form = LureForm(program, tuple(_owned(leaf) for leaf in leaves), slopes)
    check_weights(form)
    return form, Traced(flat, registers)


def _owned(leaf: Any) -> Any:
    """A copy that shares no memory with the user's arrays, which may change in place (jax aliases NumPy on CPU)."""
    if not is_concrete(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return leaf.copy()
    copy = np.array(leaf)
    copy.setflags(write=False)
    return copy


@partial(jax.jit, static_argnames="dtype")
def _evaluate_rows(form: LureForm, x: Any, dtype: Any) -> Any:
    return jax.vmap(lambda row: form.evaluate(row, dtype))(x)


_ROWS = 3  # rows of the batch on which independence is proved


def _check_rows(call: Function, params: Any, spec: jax.ShapeDtypeStruct, form: LureForm) -> None:
    """Refuse a batch function in which the output of one row depends on another row of the input.

    Proved on a batch of three, exact up to weights that are zero: its form is run on patterns of zeros and ones with
    coefficients replaced by one, so that nothing cancels. Row by row it must also agree with the form of one example,
    at random points, with three rows and with as many as the given batch has.
    """
    shape = one_array(jax.eval_shape(call, params, spec)).shape
    if len(shape) not in (1, 2) or shape[0] != spec.shape[0]:
        raise ValueError(
            f"batched=True: a batch of {spec.shape[0]} rows gave an output of shape {shape}, not one row each"
        )
    batch = jax.ShapeDtypeStruct((_ROWS, *spec.shape[1:]), spec.dtype)
    wide, _ = _form(lambda p, v: jnp.reshape(call(p, v), (-1,)), params, batch)
    if wide.is_traced:
        return
    masks = np.zeros((_ROWS, *batch.shape), np.float32)
    masks[np.arange(_ROWS), np.arange(_ROWS)] = 1
    reached = np.stack(
        [np.asarray(_reach(wide, jnp.asarray(m))).reshape(_ROWS, -1).any(axis=1) for m in masks]
    )
    mixed = bool((reached & ~np.eye(_ROWS, dtype=bool)).any())
    for count in (_ROWS, spec.shape[0]) if not mixed else ():
        shape = (count, *spec.shape[1:])
        point = jnp.asarray(np.random.default_rng(1).standard_normal(shape), batch.dtype)
        with jax.default_matmul_precision("highest"):
            rows = np.asarray(call(params, point), np.float64).reshape(count, -1)
        ones = np.asarray(_evaluate_rows(form, point, batch.dtype), np.float64)
        scale = np.abs(rows).max(axis=0, initial=0.0) + 1e-3  # per output
        mixed = mixed or bool((np.abs(rows - ones) > 0.01 * scale).any())
    if mixed:
        reason = "the output of one row depends on another row of the batch, or on how many there are"
        remedy = "call model.eval() on a copy if this is BatchNorm; otherwise trace a function of one example"
        raise _refusal("batched function", batch.shape, reason, remedy)


class _Marks(Arrays):
    """1 where an entry depends on a marked entry of the input, by the structure of the program alone."""

    def __init__(self, form: LureForm, dtype: Any) -> None:
        self.taps = form.taps
        super().__init__(form, self.mark, dtype, affine=True)

    def mark(self, k: int, y: Any) -> Any:
        groups, kind = self.taps[k].groups, self.taps[k].kind
        if groups is None:
            return y
        rows = y[groups.array].max(axis=1)
        if kind != "sort":
            return rows
        return jnp.zeros(self.taps[k].size_out, y.dtype).at[groups.array].set(rows[:, None])

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        joint = KINDS[op.kind].joint
        args = []
        for i in op.inputs:
            if i >= 0:
                args.append(held[i])
            else:
                const = jnp.asarray(self.consts[-1 - i])
                args.append((jnp.zeros_like(const) if joint else const != 0).astype(self.dtype))
        if op.kind == "sub":
            out = jnp.add(*args)
        elif op.kind == "neg":
            out = args[0]
        elif op.kind == "div":
            out = jnp.broadcast_to(args[0], jnp.broadcast_shapes(args[0].shape, args[1].shape))
        else:
            out = apply_op(op, args)
        return (out > 0).astype(self.dtype)


@jax.jit
def _reach(form: LureForm, mask: jax.Array) -> jax.Array:
    """1 where an entry of the output depends on the marked entries of the input (structurally)."""
    held = walk(form.program, _Marks(form, mask.dtype), {0: mask})
    return held[form.program.output].ravel()
