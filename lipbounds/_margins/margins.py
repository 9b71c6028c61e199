"""`lb.margins`: proved lower bounds of every margin on the balls around examples. The mathematics is in `__init__`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipbounds._form.inputs import check_box
from lipbounds._form.lure import LureForm
from lipbounds._form.units import Units
from lipbounds._gain.memory_budget import parse
from lipbounds._local.forward import check_examples
from lipbounds._local.local import box_notes, check_eps
from lipbounds._margins import branching, search
from lipbounds._margins.found import Found
from lipbounds._margins.problem import Problem
from lipbounds._text.arguments import whole
from lipbounds._text.calls import public
from lipbounds._text.html import Html, element
from lipbounds._text.progress import Progress
from lipbounds._text.tables import printable
from lipbounds.results import NORM_NAMES, Norm, check_norm


@dataclass(frozen=True, eq=False)
class Margins:
    """Lower bounds of the margins of N examples on their balls.

    Args:
        value: (N, K) lower bounds of z_y - z_i over the ball, inf for the own class i = y; of a network with one
            output (N, 1), of z for label 1 and of -z for label 0.
        eps: (N,) radii of the balls.
        norm: 2 or inf.
        guarantee: "verified".
        seconds: the time of all of them together.
        notes: remarks for the reader.
        complete: False where Ctrl-C ended the search: the bounds hold, and higher ones might have been found.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> found = lb.margins(form, [[1.0, 0.5]], [0], 0.1)
        >>> found.certified.tolist(), len(found)
        ([True], 1)
    """

    value: np.ndarray
    eps: np.ndarray
    norm: float
    guarantee: str
    seconds: float
    notes: tuple[str, ...] = field(default=())
    complete: bool = True

    def __len__(self) -> int:
        return len(self.value)

    @property
    def least(self) -> np.ndarray:
        """(N,) the smallest margin of every example."""
        return np.asarray(self.value.min(axis=1, initial=np.inf))

    @property
    def certified(self) -> np.ndarray:
        """(N,) whether no input of the ball is classified otherwise than labelled."""
        return np.asarray(self.least > 0)

    def __repr__(self) -> str:
        n = len(self)
        head = f"Margins: {n} examples, {NORM_NAMES[self.norm]} balls, {self.guarantee}, {self.seconds:.1f} s"
        if n:
            head += f"\n  certified {self.certified.mean():.2%}"
        return "\n".join([head, *(f"  note      {printable(note)}" for note in self.notes)])

    def _repr_html_(self) -> Html:
        return element("pre", repr(self))


@public
def margins(
    form: LureForm,
    X: Any,
    y: Any,
    eps: Any,
    *,
    norm: Norm = 2,
    box: Any = None,
    iterations: int = 200,
    memory: int | str | None = None,
    input_range: tuple[float, float] | None = None,
    progress: Progress = True,
) -> Margins:
    """Lower bounds of every margin z_y - z_i on the balls ||x' - x|| <= eps around labelled examples.

    Lagrangian duality with one multiplier per constraint of every neuron whose sign is open on the ball (see
    `lipbounds._margins`): at least the bound of the local ellipsoids, z_y - z_i - eps L_yi(eps), which bound the
    increment alone, and usually far above it.

    Args:
        form: from `lb.trace`. Its activations are functions of one number whose slopes are proved (relu, abs, tanh,
            gelu, any that is traced), or max, min and sort.
        X: (N, *in_shape), floating point.
        y: (N,) integer labels; of a network with one output 1 or 0, by its sign.
        eps: radius > 0 of the balls, one for all or (N,), in the units of the traced function's input.
        norm: 2 or inf, of the balls.
        box: (lower, upper), numbers or arrays of the shape of an input: only points inside count, (0, 1) for pixels.
        iterations: of the search for multipliers, at most, per margin; more tighten the bounds.
        memory: None (2 GiB), or a budget in bytes or as "4GB". As in `lb.local` it says how wide a network may be. An
            example keeps the bound of the local ellipsoids, with a note, where so many neurons may change their sign
            that its proof does not fit.
        input_range: (low, high), the range of the entries of X, which are held to it then; None warns
            (`lb.UnitsWarning`) where X looks like images in other units than [0, 1].
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Returns:
        `Margins`: value (N, K), inf for the own class; verified.

    Raises:
        TypeError: not a concrete form.
        ValueError: shapes, values that are not finite, eps not > 0, norm 1, other activations, a network whose local
            ellipsoids do not fit the memory (wider than 1100 only).

    In networks wider than some hundred neurons the neurons of an example whose sign is open are searched alone: an
    evaluation takes about 10 n^3 operations for n of them, a margin at most `iterations` evaluations and a proof of a
    few n^3; progress says how long the rest takes at most. All devices of the process share the margins.

    Ctrl-C ends the search and keeps the bounds that are proved.

    Source: Raghunathan, Steinhardt and Liang, Semidefinite relaxations for certifying robustness, NeurIPS 2018, in the
        dual, with products of the bounds of every neuron.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> lb.margins(form, [[1.0, 0.5]], [0], 0.1).value.round(3).tolist()
        [[inf, 0.717]]
    """
    begin = time.perf_counter()
    problem = prepare(form, X, y, eps, norm=norm, box=box, memory=memory, units=Units(input_range))
    rounds = -(-whole("iterations", iterations) // search.ROUND)
    value = problem.balls.local.copy()
    pairs = [(row, other) for row in range(len(value)) for other in problem.others(row)]
    found = Found(problem, value, len(pairs))
    notes, complete = (*form.notes, *box_notes(problem.box)), True
    try:
        found.run(pairs, goal=np.inf, rounds=rounds)
    except KeyboardInterrupt:
        notes = (*notes, f"interrupted: the dual is done for {found.done} of {len(pairs)} margins")
        complete = False
    notes = (*notes, *problem.notes)
    seconds = time.perf_counter() - begin
    return Margins(value, problem.eps, problem.norm, "verified", seconds, notes, complete)


def prepare(
    form: LureForm,
    X: Any,
    y: Any,
    eps: Any,
    *,
    norm: Norm = 2,
    box: Any = None,
    memory: int | str | None = None,
    units: Units | None = None,
) -> Problem:
    """The arguments of `margins`, checked, and the local ellipsoids around them."""
    if not isinstance(form, LureForm):
        raise TypeError(f"margins needs a LureForm from lb.trace, got {type(form).__name__}")
    if form.is_traced:
        raise TypeError("margins works on concrete weights, outside jit, grad and vmap")
    x, labels = check_examples(form, X, y, units)
    radii = check_eps(eps, len(x))
    budget = parse(memory)
    return Problem(form, x, labels, radii, norm=check_norm(norm), box=check_box(box, x), memory=budget)


#: What `decide` finds of an example; the first three are proofs.
PROOFS = "ellipsoids", "dual", "branching"
OPEN = "not proved"
WORDS = "<U14"  # NumPy's type of them


@public
def decide(
    problem: Problem,
    verdict: np.ndarray | None = None,
    *,
    iterations: int = 200,
    seconds_per_image: float = 0.0,
) -> np.ndarray:
    """(N,) for every ball of `prepare` the proof that certifies it (all margins are positive), or why there is none.

    The cheapest proof first: local ellipsoids, then the dual for the margins that are still open, the worst one of
    every example first. An example is given up where its ball holds a misclassified point ("counterexample"), or with
    its first margin that cannot be proved. Then, where `seconds_per_image` is above 0, branching on the signs of
    neurons, for so long per example that is still open ("out of time" where that was too short); what it certifies
    depends on the speed of the machine. "failed": the proof does not fit the memory, `problem.notes` says so.

    verdict: (N,) of `OPEN`, changed in place, so that what is found before Ctrl-C stays.
    """
    value = problem.balls.local.copy()
    verdict = np.full(len(value), OPEN, WORDS) if verdict is None else verdict
    rounds = -(-whole("iterations", iterations) // search.ROUND)
    alive = (problem.balls.gaps > 0).all(axis=1)
    verdict[~alive] = "wrong"
    verdict[alive & (value > 0).all(axis=1)] = "ellipsoids"
    left = np.flatnonzero(verdict == OPEN)
    if not left.size:
        return verdict
    verdict[left[problem.counterexamples(left)]] = "counterexample"
    left = np.flatnonzero(verdict == OPEN)
    ranked = sorted(
        (rank, row, int(other))
        for row in left.tolist()
        for rank, other in enumerate(np.argsort(value[row]).tolist())
        if value[row, other] <= 0
    )
    pairs = [(row, other) for _, row, other in ranked]
    found = Found(problem, value, len(pairs))
    try:
        found.run(pairs, goal=0.0, rounds=rounds)
    finally:  # also on Ctrl-C
        verdict[left[(value[left] > 0).all(axis=1)]] = "dual"
    verdict[[row for row in problem.too_large if verdict[row] == OPEN]] = "failed"
    if seconds_per_image > 0:
        rest = np.flatnonzero(verdict == OPEN).tolist()
        rest.sort(key=found.best, reverse=True)
        branching.certify_each(found, rest, rounds, seconds_per_image, verdict)
    return verdict
