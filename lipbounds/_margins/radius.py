"""Certified radii: how far an input must move before the predicted class can change.

    r(x) = min over i != y of (z_y - z_i) / L_yi       for correctly classified x, 0 otherwise

(one output f is a binary classifier, of class 1 where f > 0 and of class 0 where f < 0: r(x) = |f| / L)
in the norm of the bound and in the units of the traced function's input. The logits are those of the certified network
(exact real arithmetic): they are computed in float64 on the host and the rounding error of that computation is bounded
and subtracted, so a radius is as good as its bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipbounds._form.inputs import Box, box_ends, check_box
from lipbounds._form.lure import LureForm, check_network
from lipbounds._form.units import Units
from lipbounds._gain.memory_budget import parse
from lipbounds._local.engines import NoEngineError, bounded
from lipbounds._local.forward import DECLARED_ACCURACY, check_examples, enclosable, logits, proved_gaps
from lipbounds._local.local import box_notes, check_eps
from lipbounds._local.radius_search import Search, ratios
from lipbounds._margins.largest import enlarge
from lipbounds._margins.margins import OPEN, PROOFS, WORDS, decide, prepare
from lipbounds._text.arguments import whole
from lipbounds._text.calls import FAILURES, moved, public, reason
from lipbounds._text.device import Device
from lipbounds._text.html import Html, element
from lipbounds._text.progress import Progress
from lipbounds._text.tables import label_text, new_axes, printable
from lipbounds._triangle import recursion
from lipbounds._triangle.liplt import liplt
from lipbounds.results import NORM_NAMES, Guarantee, UpperBound, weakest

MOST_PAIRED = 2048  # outputs up to which pairs are bounded where no bound is given
# a radius is certified at eps if it is larger: balls are larger than eps by this share of it
_ABOVE = 2.0**-40
INTERRUPTED = "interrupted: radii are as far as they were proved"


#: Outcomes of `Radii`: proofs, cheapest first, then why there is none.
OUTCOMES = ("global", "hybrid", "ellipsoids", "LipLT", "dual", "branching") + (
    "wrong", "counterexample", "not proved", "out of time", "failed", "interrupted",
)  # fmt: skip


def listed(counts: Mapping[str, int]) -> str:
    """Counts of outcomes as text: "global 75, dual 12"."""
    return ", ".join(f"{word} {count}" for word, count in counts.items())


@dataclass(frozen=True, eq=False)
class Radii:
    """Certified radii of N examples.

    Args:
        radius: (N,) in the units of the traced function's input; 0 where misclassified or tied; inf where no class can
            ever win (L_yi = 0 with positive margin, or a certified ball that holds the whole box).
        correct: (N,) whether the certified network classifies the example as labelled (ties count as wrong).
        norm: 2, 1 or inf, of the perturbation.
        guarantee: that of the bound ("verified", "probabilistic", "assumed").
        method: of the bound.
        notes: remarks for the reader.
        complete: False where Ctrl-C ended the search for local radii, and larger ones might have been found.
        outcome: (N,) the proof that gives the radius: "global" (the bound of the whole network), "hybrid",
            "ellipsoids", "LipLT" (local bounds), "dual" or "branching"; "wrong" where misclassified or tied. With eps=
            also why an example is not certified: "counterexample" (the ball holds one), "not proved" (every engine that
            applies has come to its end), "out of time" (of branching), "failed" (an engine ended with an error, or did
            not fit the memory: a note has the reason) or "interrupted". None where a file does not say, "" where it
            does not say it of an example.
        label: (N,) the labels that were given, and
        prediction: (N,) the class of the largest logit in float64 (of one output, 1 where it is positive). An example
            whose prediction is its label is not `correct` where rounding might turn the two largest logits around. None
            where a file does not say; where it says it of some examples only, float64 with NaN at the others.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> radii = lb.certified_radius(form, [[1.0, 0.5], [0.0, 1.0]], [0, 0])
        >>> radii.correct.tolist(), radii.certified(0.2).tolist(), radii.counts
        ([True, False], [True, False], {'global': 1, 'wrong': 1})
    """

    radius: np.ndarray
    correct: np.ndarray
    norm: float
    guarantee: str
    method: str
    notes: tuple[str, ...] = field(default=())
    complete: bool = True
    outcome: np.ndarray | None = None
    label: np.ndarray | None = None
    prediction: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.radius)

    @property
    def counts(self) -> dict[str, int]:
        """How many examples have each outcome."""
        seen = [] if self.outcome is None else self.outcome.tolist()
        return {word: seen.count(word) for word in OUTCOMES if word in seen}

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
        if not {"global", "wrong"}.issuperset(self.counts):
            lines.append(f"  outcome   {listed(self.counts)}")
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


@dataclass(frozen=True, eq=False)
class Local:
    """How `certified_radius(..., local=lb.Local(...))` bounds the network around each example.

    Args:
        tries: number of eps tried per example and engine. Balls that are certified as a whole do not count while
            larger ones may be.
        box: (lower, upper), as in `lb.local`: a radius is then about the inputs inside it only.
        memory: as in `lb.local`, the budget of the ellipsoids of wide networks.
        margins: also search the largest balls that the dual of `lb.margins` certifies, `tries` balls per example. This
            gives larger radii, most of all inside a box, in seconds per example instead of hundredths; a radius is inf
            where a certified ball holds the whole box. With `eps=` the dual is used in any case.
        seconds_per_image: with `eps=` or `margins`, time for branching on the signs of neurons, per example (and ball)
            that everything else leaves open; what it certifies depends on the speed of the machine. 0 is no branching.

    Raises:
        ValueError: tries is not a whole number >= 1, memory is no budget, margins is not True or False,
            seconds_per_image is not a number >= 0, or box is not (lower, upper) with lower <= upper. `certified_radius`
            checks the box against the examples.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> near = lb.Local(tries=8, box=(0.0, 1.0))
        >>> lb.certified_radius(form, [[1.0, 0.5]], [0], local=near).radius.round(2).tolist()
        [0.35]
    """

    tries: int = 4
    box: Any = None
    memory: int | str | None = None
    seconds_per_image: float = 0.0
    margins: bool = False

    def __post_init__(self) -> None:
        whole("tries", self.tries)
        if not isinstance(self.margins, bool | np.bool_):
            raise ValueError(f"margins must be True or False, got {self.margins!r}")
        parse(self.memory)
        if self.box is not None:
            box_ends(self.box)
        if not 0 <= float(self.seconds_per_image) < np.inf:
            raise ValueError(f"seconds_per_image must be a number >= 0, got {self.seconds_per_image!r}")


@public
@moved(tries="local=lb.Local(tries=...)", box="local=lb.Local(box=...)")
def certified_radius(
    form: LureForm,
    X: Any,
    y: Any,
    bound: UpperBound | None = None,
    local: bool | Local = False,
    *,
    eps: float | None = None,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    input_range: tuple[float, float] | None = None,
    device: Device = "auto",
    progress: Progress = True,
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
            of radius eps certifies min(eps, min_i (z_y - z_i) / L_yi(eps)). The result is the maximum of these and the
            global radius. Norms 2 and inf (a radius in l2 is one in l1, too). If no local bound applies (more than 4096
            outputs) the global radii are returned, with a note. True or `lb.Local(...)`.
        eps: a radius that is enough, with local. Every engine is used that can certify it, cheapest first, and only
            around the examples that are still open: the bound of the whole network, the local bounds, and the dual of
            `lb.margins`. A radius is then at least eps where the example is certified at eps.
        guarantee, seed: of the bound where it is computed here, and with local as in `lb.local`.
        input_range: (low, high), the range of the entries of X, which are held to it then; None warns
            (`lb.UnitsWarning`) where X looks like images in other units than [0, 1].
        device: where large proofs are computed: "auto" (on a GPU where JAX has one by default), "cpu" or "gpu".
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        TypeError: an Estimate or LowerBound in place of an upper bound.
        ValueError: shapes, labels out of range, values that are not finite, a bound of another network's size, eps
            without local.

    Source: Tsuzuku et al., Lipschitz-margin training, NeurIPS 2018, Proposition 1, with a constant per pair of classes.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> X, y = [[1.0, 0.5], [0.0, 1.0]], [0, 0]
        >>> radii = lb.certified_radius(form, X, y, bound=lb.lipsdp(form, pairwise=True))
        >>> radii.radius.round(3).tolist(), radii.accuracy(0.3)
        ([0.354, 0.0], 0.5)
    """
    if not isinstance(form, LureForm):
        raise TypeError(f"certified_radius needs a LureForm from lb.trace, got {type(form).__name__}")
    if form.is_traced:
        raise TypeError("certified_radius works on concrete weights, outside jit, grad and vmap")
    x, labels = check_examples(form, X, y, Units(input_range))
    if not isinstance(local, bool | Local):
        raise ValueError(f"local must be True, False or a lb.Local, got {local!r}")
    near = Local() if local is True else local or None
    inside = None if near is None else check_box(near.box, x)
    if eps is not None and near is None:
        raise ValueError(
            "eps= is where the search for local radii may stop: pass local=True, or ask radii.accuracy(eps)"
        )
    if eps is None and near is not None and near.seconds_per_image and not near.margins:
        raise ValueError(
            "seconds_per_image is the time of branching, which needs eps= or lb.Local(margins=True): pass one of them, "
            "or leave it out"
        )
    goal = None if eps is None else float(check_eps(eps, 1)[0]) * (1 + _ABOVE)
    few = form.num_outputs <= MOST_PAIRED
    proof = liplt(form, pairwise=few, guarantee=guarantee, seed=seed) if bound is None else bound
    if not isinstance(proof, UpperBound):
        raise TypeError(f"a radius needs an UpperBound, got {type(proof).__name__}, which proves nothing")
    check_network(form, proof.network, "`bound`")
    constants, notes = _pair_constants(proof, form.num_outputs)
    notes = (*notes, *form.notes)
    if not all(enclosable(recursion.host_form(form), tap) for tap in form.taps):
        exact = f"{DECLARED_ACCURACY:g}"
        notes = (*notes, f"a declared activation is evaluated in float64, assumed accurate to {exact}")
    z, error = logits(form, x)
    gaps = proved_gaps(z, error, labels)
    predicted = z.argmax(axis=1) if form.num_outputs > 1 else (z[:, 0] > 0).astype(np.int64)
    scale = constants[labels] if form.num_outputs > 1 else np.broadcast_to(constants, gaps.shape)
    correct = np.asarray((gaps > 0).all(axis=1))
    radius = np.where(correct, ratios(gaps, scale), 0.0)
    outcome = np.where(correct, np.where(radius > 0, "global", OPEN), "wrong").astype(WORDS)
    if near is None:
        same = proof.norm, proof.guarantee, proof.method
        return Radii(radius, correct, *same, notes, True, outcome, labels, predicted)
    search = Search(labels, gaps, radius, near.tries, goal)
    said, risks = _searched(form, x, search, outcome, proof.norm, near, inside, guarantee, seed)
    method = f"local, {proof.method}" if len(risks) else proof.method
    return Radii(
        search.best,
        correct,
        proof.norm,
        weakest([proof.guarantee, *risks]),
        method,
        (*notes, *said, *box_notes(inside)),
        not search.interrupted,
        outcome,
        labels,
        predicted,
    )


Found = tuple[tuple[str, ...], tuple[str, ...]]  # notes, and guarantees of the engines that were used


def _searched(
    form: LureForm,
    x: np.ndarray,
    search: Search,
    outcome: np.ndarray,
    norm: float,
    near: Local,
    box: Box | None,
    guarantee: str,
    seed: int,
) -> Found:
    """Raise the radii by every engine, cheapest first, and say in `outcome` (N,) which one gave them.

    Ctrl-C ends the search, not the call: what is proved stays.
    """
    notes: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()
    verdict, rows = np.zeros(0, WORDS), np.zeros(0, int)
    reason_to_be_open = "interrupted"
    # the guarantee of what an engine found before it was interrupted
    unknown = "probabilistic" if guarantee == "auto" else guarantee
    try:
        try:
            found = bounded(
                form,
                norm,
                x[search.todo],
                search.run,
                guarantee=guarantee,
                seed=seed,
                box=box,
                memory=parse(near.memory),
            )
            notes, risks, broken = found.notes, found.guarantees, bool(found.broken)
        except NoEngineError as error:
            notes, broken = (f"global radii: {error}",), False
        unknown = "verified"  # all that follows is
        if search.goal is not None:
            rows = search.open()
            verdict = np.full(rows.size, OPEN, WORDS)
            if rows.size:
                said = _decided(form, x[rows], search.labels[rows], search.goal, verdict, norm, near)
                notes = (*notes, *said)
        elif near.margins:
            notes = (*notes, *_enlarged(form, x, search, norm, near))
            risks = (*risks, "verified") if np.isin(search.by, PROOFS).any() else risks
        reason_to_be_open = "failed" if broken else OPEN
    except KeyboardInterrupt:
        search.interrupted = True
        notes = (*notes, INTERRUPTED)
        risks = (*risks, unknown)
    outcome[search.by != ""] = search.by[search.by != ""]
    if search.goal is not None:
        outcome[search.open()] = reason_to_be_open
        proved = np.isin(verdict, PROOFS)
        search.best[rows[proved]] = search.goal
        outcome[rows[verdict != OPEN]] = verdict[verdict != OPEN]
        risks = (*risks, "verified") if proved.any() else risks
    return (*notes, *search.notes()), risks


def _enlarged(form: LureForm, x: np.ndarray, search: Search, norm: float, near: Local) -> tuple[str, ...]:
    """Notes; the radii of the search are raised by the dual and branching, where they apply."""
    try:
        return enlarge(
            form, x, search, norm=norm, box=near.box, memory=near.memory, seconds=near.seconds_per_image
        )
    except FAILURES as error:
        return (f"without the dual of lb.margins: {reason(error)}",)


def _decided(
    form: LureForm,
    x: np.ndarray,
    labels: np.ndarray,
    eps: float,
    verdict: np.ndarray,
    norm: float,
    near: Local,
) -> tuple[str, ...]:
    """Notes; the verdicts (N,) of the dual and of branching, where they apply, are put into `verdict`."""
    try:
        problem = prepare(form, x, labels, eps, norm=norm, box=near.box, memory=near.memory)
        decide(problem, verdict, seconds_per_image=near.seconds_per_image)
    except FAILURES as error:
        if not isinstance(error, NoEngineError):
            verdict[verdict == OPEN] = "failed"
        return (f"without the dual of lb.margins: {reason(error)}",)
    proved = int(np.isin(verdict, PROOFS).sum())
    said = f"the dual of lb.margins certifies {proved} of {len(x)} examples that were open"
    return (said, *problem.notes)


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
