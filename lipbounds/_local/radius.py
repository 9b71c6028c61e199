"""Certified radii: how far an input must move before the predicted class can change.

    r(x) = min over i != y of (z_y - z_i) / L_yi       for correctly classified x, 0 otherwise

(one output f is a binary classifier, of class 1 where f > 0 and of class 0 where f < 0: r(x) = |f| / L)
in the norm of the bound and in the units of the traced function's input. The logits are those of the certified network
(exact real arithmetic): they are computed in float64 on the host and the rounding error of that computation is bounded
and subtracted, so a radius is as good as its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._activations import intervals as I
from lipbounds._form.inputs import check_box
from lipbounds._form.lure import LureForm, fingerprint, multiplicity, proved_slopes
from lipbounds._form.program import Tap
from lipbounds._form.steps import KINDS, StaticArray
from lipbounds._gain.blocks import HostForm
from lipbounds._local.engines import NoEngineError, bounded
from lipbounds._local.local import box_notes
from lipbounds._local.radius_search import Search, ratios
from lipbounds._norms.cholesky import nonzeros_per_row
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.calls import exact_products, plain_errors
from lipbounds._text.html import Html, element
from lipbounds._text.tables import label_text, new_axes, printable
from lipbounds._triangle import recursion
from lipbounds._triangle.liplt import liplt
from lipbounds._triangle.product_rounding import carriers
from lipbounds.results import NORM_NAMES, UpperBound, weakest

_DECLARED_ACCURACY = 1e-9  # of float64 values of a declared activation that interval arithmetic does not know
_MOST_PAIRED = 2048  # outputs up to which pairs are bounded where no bound is given
_CHUNK = 2**24  # entries of the widest tensor of one chunk of examples


@dataclass(frozen=True, eq=False)
class Radii:
    """Certified radii of N examples.

    Args:
        radius: (N,) in the units of the traced function's input; 0 where misclassified or tied; inf where no class can
            ever win (L_yi = 0 with positive margin).
        correct: (N,) whether the certified network classifies the example as labelled (ties count as wrong).
        norm: 2, 1 or inf, of the perturbation.
        guarantee: that of the bound ("verified", "probabilistic", "assumed").
        method: of the bound.
        notes: what a reader should know.
    """

    radius: np.ndarray
    correct: np.ndarray
    norm: float
    guarantee: str
    method: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.radius)

    def certified(self, eps: float) -> np.ndarray:
        """(N,) whether no perturbation of norm at most eps changes the class: r > eps."""
        eps = float(eps)
        if not eps >= 0:
            raise ValueError(f"eps must be a number >= 0, got {eps}")
        return self.radius > eps

    def accuracy(self, eps: float) -> float:
        """Certified accuracy: the share of examples that are correct and certified at eps."""
        if not len(self.radius):
            raise ValueError("the accuracy of an empty batch is not defined")
        return float(self.certified(eps).mean())

    def __repr__(self) -> str:
        n = len(self.radius)
        head = f"Radii: {n} examples, {NORM_NAMES[self.norm]}, {self.guarantee} ({printable(self.method)})"
        if not n:
            return head
        share = self.correct.mean()
        finite = self.radius[self.correct]
        middle = f"{np.median(finite):.4g}" if finite.size else "none"
        lines = [head, f"  correct   {share:.2%}", f"  median radius of correct examples: {middle}"]
        return "\n".join([*lines, *(f"  note      {printable(note)}" for note in self.notes)])

    def _repr_html_(self) -> Html:
        return element("pre", repr(self))

    def plot(self, ax: Any = None) -> Any:
        """Certified accuracy against eps; returns the matplotlib Axes."""
        ax = new_axes() if ax is None else ax
        finite = np.sort(self.radius[np.isfinite(self.radius)])
        top = finite[-1] if finite.size and finite[-1] > 0 else 1.0
        eps = np.linspace(0, 1.05 * top, 400)
        share = [self.certified(e).mean() if len(self.radius) else 0.0 for e in eps]
        ax.plot(eps, share, label=label_text(f"{self.method} ({self.guarantee})"))
        ax.set(
            xlabel=f"eps ({NORM_NAMES[self.norm]}, units of the input)",
            ylabel="certified accuracy",
            ylim=(0, 1),
        )
        ax.legend()
        return ax


@plain_errors
@exact_products
def certified_radius(
    form: LureForm,
    X: Any,
    y: Any,
    bound: UpperBound | None = None,
    local: bool = False,
    *,
    tries: int = 4,
    guarantee: str = "auto",
    seed: int = 0,
    box: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Radii:
    """Certified radii of labelled examples.

    Args:
        form: from `lb.trace`; radii are in the units of its input. Put normalisation inside the traced function.
        X: (N, *in_shape), floating point.
        y: (N,) integer labels; of a network with one output 1 or 0, by its sign.
        bound: an UpperBound of this form, best with `pairwise=True`; without pairs, the constant of every pair is
            sqrt(2) L (norm 2; L for norm 1, 2 L for norm inf). None computes `lb.liplt(form, pairwise=True)`, without
            pairs where the outputs are more than 2048.
        local: also bound the network around each example (`lb.local`, with slopes anchored at the example): every ball
            of radius eps certifies min(eps, min_i (z_y - z_i) / L_yi(eps)), and the largest of these and of the global
            radius counts. Never below the global radius. Norms 2 and inf. Where no local bound applies (more than 4096
            outputs, or l-inf and wider than 1100) the global radii stand, with a note.
        tries: with local, how many eps are tried per example and engine. Balls that are certified as a whole do not
            count while larger ones may be.
        guarantee, seed: of the bound where it is computed here, and with local as in `lb.local`.
        box: with local, as in `lb.local`: a radius is then about the inputs inside it only.
        progress: with local, called with a line of text as examples are done.

    Raises:
        TypeError: an Estimate or LowerBound in place of an upper bound.
        ValueError: shapes, labels out of range, values that are not finite, a bound of another network's size.
    """
    if not isinstance(form, LureForm):
        raise TypeError(f"certified_radius needs a LureForm from lb.trace, got {type(form).__name__}")
    if form.is_traced:
        raise TypeError("certified_radius works on concrete weights, outside jit, grad and vmap")
    x, labels = _examples(form, X, y)
    if not local and box is not None:
        raise ValueError("a box is for local bounds: pass local=True")
    if local and (isinstance(tries, bool) or not isinstance(tries, int) or tries < 1):
        raise ValueError(f"tries must be a whole number >= 1, got {tries!r}")
    inside = check_box(box, x)
    few = form.num_outputs <= _MOST_PAIRED
    proof = liplt(form, pairwise=few, guarantee=guarantee, seed=seed) if bound is None else bound
    if not isinstance(proof, UpperBound):
        raise TypeError(f"a radius needs an UpperBound, got {type(proof).__name__}: it would prove nothing")
    if proof.network is not None and proof.network != fingerprint(form):
        raise ValueError(
            "this bound was computed from another network: bound this form, or leave `bound` out"
        )
    constants, notes = _pair_constants(proof, form.num_outputs)
    notes = (*notes, *form.notes)
    if not all(_enclosable(recursion.host_form(form), tap) for tap in form.taps):
        notes = (
            *notes,
            f"a declared activation is evaluated in float64, assumed right to {_DECLARED_ACCURACY:g}",
        )
    gaps = _margins(*logits(form, x), labels)
    scale = constants[labels] if form.num_outputs > 1 else np.broadcast_to(constants, gaps.shape)
    correct = np.asarray((gaps > 0).all(axis=1))
    radius = np.where(correct, ratios(gaps, scale), 0.0)
    fields = correct, proof.norm
    if not local:
        return Radii(radius, *fields, proof.guarantee, proof.method, notes)
    search = Search(labels, gaps, radius, tries)
    try:
        found = bounded(
            form,
            proof.norm,
            x[search.todo],
            lambda around: search.run(around, progress),
            guarantee=guarantee,
            seed=seed,
            box=inside,
        )
    except NoEngineError as error:
        return Radii(radius, *fields, proof.guarantee, proof.method, (*notes, f"global radii: {error}"))
    notes = (*notes, *found.notes, *search.notes(), *box_notes(inside))
    risk = weakest([proof.guarantee, *found.guarantees])
    return Radii(search.best, *fields, risk, f"local, {proof.method}", notes)


def _margins(z: np.ndarray, error: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) proved margins z_y - z_i, rounded down, inf for i = y; of one output f (N, 1), f for label 1, else -f."""
    rows = np.arange(len(labels))
    with np.errstate(over="ignore"):
        if z.shape[1] == 1:
            gaps = np.where(labels == 1, z[:, 0], -z[:, 0])[:, None]
            return gaps - (np.abs(gaps) * 4 * U + (error * (1 + 4 * U))[:, None])
        slack = error * (math.sqrt(2) * (1 + 8 * U))
        gaps = z[rows, labels][:, None] - z
        gaps = gaps - (np.abs(gaps) * 4 * U + slack[:, None])
    gaps[rows, labels] = np.inf
    return gaps


def check_inputs(form: LureForm, X: Any) -> np.ndarray:
    """The examples (N, *in_shape) in float64, checked."""
    x = np.asarray(X)
    if x.dtype.kind not in "f" and x.dtype.name not in ("bfloat16", "float16"):
        raise ValueError(
            f"X must be floating point in the units of the traced function, got {x.dtype}: cast it first"
        )
    if x.ndim != len(form.in_shape) + 1 or x.shape[1:] != form.in_shape:
        raise ValueError(f"X must have shape (N, {', '.join(map(str, form.in_shape))}), got {x.shape}")
    if form.is_traced:
        raise TypeError("concrete weights are needed, outside jit, grad and vmap")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("X holds NaN or infinite values")
    return x


def _examples(form: LureForm, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, labels = check_inputs(form, X), np.asarray(y)
    if labels.shape != (len(x),):
        raise ValueError(f"y must have shape ({len(x)},), one label per example, got {labels.shape}")
    if len(labels) and labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if form.num_outputs < 1:
        raise ValueError("a radius needs outputs: the logits of the classes, or one whose sign decides")
    labels = labels.astype(np.int64)
    last = max(form.num_outputs, 2) - 1
    if ((labels < 0) | (labels > last)).any():
        bad = labels[(labels < 0) | (labels > last)][0]
        raise ValueError(f"labels must lie in 0..{last}, got {bad}")
    return x, labels


def _pair_constants(bound: UpperBound, classes: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if classes == 1 and (bound.pairwise is None or bound.pairwise.shape == (1, 1)):
        return np.full((1, 1), bound.value), ("one output: its sign decides, label 1 where it is positive",)
    if bound.pairwise is not None:
        if bound.pairwise.shape != (classes, classes):
            raise ValueError(
                f"the bound is of a network with {len(bound.pairwise)} outputs, this one has {classes}"
            )
        return bound.pairwise, ()
    constant = bound.any_pair()
    name = "sqrt(2) L" if bound.norm == 2 else "L" if bound.norm == 1 else "2 L"
    note = f"without pairwise constants every pair uses {name} = {constant:.6g}; pairwise=True is never worse"
    return np.broadcast_to(constant, (classes, classes)), (note,)


# --- logits with a proved error ------------------------------------------------------------------------------------


Seen = list[tuple[np.ndarray, np.ndarray]]


def logits(form: LureForm, x: np.ndarray, seen: Seen | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(z, error): float64 logits (N, K) and proved (N,) bounds of ||z - z_exact||_2; the same of every tap's
    pre-activations (N, n) is put into `seen`.

    Between taps the rounding errors of the linear steps are bounded entrywise; at each tap their 2-norm is carried to
    the output by the constants of the naive recursion,
        t_k = ||delta_k|| + sum_j ||D[k, j]|| (max|slope_j| t_j + ||eta_j||),
    with delta_k the error made since the last taps and eta_j that of evaluating tap j.
    """
    host = recursion.host_form(form)
    widest = max(int(np.prod(shape)) for shape in form.program.shapes)
    step = max(1, _CHUNK // max(widest, 1))
    carried = carriers(form)
    z = np.zeros((len(x), form.num_outputs))
    error = np.zeros(len(x))
    if seen is not None:
        seen += [(np.zeros((len(x), tap.size_in)), np.zeros(len(x))) for tap in form.taps]
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        taps: Seen = []
        z[part], error[part] = _run(form, host, carried, x[part].reshape(len(x[part]), -1), taps)
        for here, (y, wrong) in zip(seen or [], taps, strict=False):
            here[0][part], here[1][part] = y, wrong
    if not np.isfinite(z).all() or not np.isfinite(error).all():
        raise ValueError("the network is not finite at some of these examples")
    return z, error


def _run(
    form: LureForm, host: HostForm, carried: dict[tuple[int, int], float], x: np.ndarray, seen: Seen
) -> tuple[np.ndarray, np.ndarray]:
    program, count = form.program, len(x)
    values: dict[int, np.ndarray] = {0: x.T}
    errors: dict[int, np.ndarray] = {0: np.zeros_like(x.T)}
    total: dict[int, np.ndarray] = {}
    evaluation: dict[int, np.ndarray] = {}

    def length(entries: np.ndarray) -> np.ndarray:
        top = np.maximum(entries.max(axis=0, initial=0.0), 1e-300)
        return top * np.sqrt(np.square(entries / top).sum(axis=0)) * (1 + gamma(len(entries) + 8))

    def gather(target: int, delta: np.ndarray) -> np.ndarray:
        """t_k per example."""
        t = length(delta)
        for j, tap in enumerate(program.taps):
            if (target, j) in carried and j in total:
                slope = _largest_slope(form, j, tap)
                t = t + carried[target, j] * (slope * total[j] + evaluation[j])
        return t * (1 + gamma(4 * len(program.taps) + 8))

    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for place, step in enumerate(program.steps):
            if isinstance(step, int):
                tap = program.taps[step]
                y = np.concatenate([values[i] for i in tap.inputs])
                delta = np.concatenate([errors[i] for i in tap.inputs])
                scale = np.sqrt(multiplicity(tap))[:, None] * (1 + 4 * U)
                total[step] = gather(step, delta * scale)
                seen.append((y.T, total[step]))
                v, eta = _apply(host, tap, y)
                evaluation[step] = length(eta)
                begin = 0
                for register in tap.outputs:
                    size = int(np.prod(program.shapes[register]))
                    values[register] = v[begin : begin + size]
                    errors[register] = np.zeros((size, count))
                    begin += size
                continue
            out = np.zeros((int(np.prod(program.shapes[step.output])), count))
            error = np.zeros_like(out)
            offset = _offset(host, step, program.shapes)
            if offset is not None:
                out, error = out + offset[0][:, None], error + offset[1][:, None]
            for m in host.step(place):
                value, wrong = values[m.register], errors[m.register]
                if m.rows is not None and (m.rows >= 0).all():
                    product, spread = value[m.rows], wrong[m.rows]
                else:
                    size = abs(m.matrix)
                    terms = nonzeros_per_row(m.matrix)
                    product = m.matrix @ value
                    spread = size @ (
                        wrong * (1 + 2 * m.relerr) + np.abs(value) * (gamma(terms + 1) + m.relerr)
                    )
                    spread = spread * (1 + gamma(terms + 4)) + terms * 2.0**-1022
                out = out + product
                error = (error + spread + np.abs(out) * U) * (1 + 4 * U)
            values[step.output], errors[step.output] = out, error
        z = values[program.output]
        return z.T, gather(-1, errors[program.output])


def _offset(host: HostForm, step: Any, shapes: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The constant part of an affine step, and an entrywise bound of its rounding error (constants that are summed)."""
    if not KINDS[step.kind].joint or all(i >= 0 for i in step.inputs):
        return None
    if step.kind == "scatter_add":
        target = dict(step.params)["target"].array.ravel()
        base, updates = (
            np.zeros(int(np.prod(shapes[i]))) if i >= 0 else host.consts[-1 - i].astype(np.float64).ravel()
            for i in step.inputs
        )
        total, size, kept = base.copy(), np.abs(base), target >= 0
        np.add.at(total, target[kept], updates[kept])
        np.add.at(size, target[kept], np.abs(updates[kept]))
        terms = int(np.bincount(target[kept]).max(initial=0))
        return total, gamma(terms) * size * (1 + gamma(terms + 4))
    args = []
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        for i in step.inputs:
            args.append(jnp.zeros(shapes[i]) if i >= 0 else jnp.asarray(host.consts[-1 - i], jnp.float64))
        value = np.asarray(KINDS[step.kind].apply(dict(step.params), *args), np.float64).ravel()
    return value, np.zeros_like(value)


def _largest_slope(form: LureForm, k: int, tap: Tap) -> float:
    if tap.groups is not None:
        return 1.0
    lower, upper = proved_slopes(form, k)
    return float(max(np.abs(lower).max(initial=0.0), np.abs(upper).max(initial=0.0)))


def _enclosable(host: HostForm, tap: Tap) -> bool:
    """False for a declared activation made of a primitive that interval arithmetic does not know."""
    if not tap.assumed:
        return True
    assert tap.expr is not None
    consts = [c.array if isinstance(c, StaticArray) else host.consts[c] for c in tap.consts]
    zero = np.zeros(tap.shapes[0])
    try:
        activations.enclose(tap.expr, consts, zero, zero)
    except activations.SlopeError:
        return False
    return True


def _apply(host: HostForm, tap: Tap, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, error): the tap at the columns of y (size_in, N), and an entrywise bound of its evaluation error."""
    if tap.expr is not None:
        consts = [c.array if isinstance(c, StaticArray) else host.consts[c] for c in tap.consts]
        point = y.T.reshape(y.shape[1], *tap.shapes[0])
        if not _enclosable(host, tap):
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                v = np.asarray(activations.evaluate(tap.expr, consts, jnp.asarray(point)), np.float64)
            v = np.broadcast_to(v, point.shape).reshape(y.shape[1], -1).T
            return v, _DECLARED_ACCURACY * (1 + np.abs(v))
        low, high = activations.enclose(tap.expr, consts, point, point)
        low, high = (np.broadcast_to(a, point.shape).reshape(y.shape[1], -1).T for a in (low, high))
        middle = low + (high - low) / 2
        return middle, np.nextafter(np.maximum(high - middle, middle - low), np.inf) * (high > low)
    assert tap.groups is not None
    rows = y[tap.groups.array]  # (groups, width, N)
    if tap.kind == "sort":
        v = np.zeros((tap.size_out, y.shape[1]))
        v[tap.groups.array] = np.sort(rows, axis=1)
    elif tap.kind == "logsumexp":
        return _logsumexp(rows)
    else:
        v = {"max": np.max, "min": np.min}[tap.kind](rows, axis=1)
    return v, np.zeros_like(v)


def _logsumexp(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, error) of log(sum(exp(rows))) over axis 1: m + log(sum(exp(rows - m))), m the maximum, in intervals."""
    top = rows.max(axis=1, keepdims=True)
    with I.quiet():
        powers = I.exp(I.sub(I.point(rows), I.point(top)))
        slip = gamma(rows.shape[1] + 1)
        low, high = (end.sum(axis=1) * (1 + sign * slip) for end, sign in zip(powers, (-1, 1), strict=True))
        low, high = I.add(I.log((np.maximum(low, 1.0), high)), I.point(top[:, 0]))  # one power is exp(0)
    middle = low + (high - low) / 2
    return middle, np.nextafter(np.maximum(high - middle, middle - low), np.inf) * (high > low)
