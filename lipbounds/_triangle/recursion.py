"""The triangle recursion on proved blocks: naive and LipLT are one function with two centres.

With blocks G[k, j] of the gain (source j: the input or a tap; target k: a tap or the output),

    m_k = ||G[k, x]|| + sum_{j < k} ||G[k, j]|| m_j                                                     (recursion)

is a Lipschitz constant of x -> y_k, and the last one of the network. Centre 0 and radius max|slope| give the naive
bound (on a chain the product of norms; on residual nets at most eq. 13 of the CRM paper), the midpoint of the slopes
gives LipLT (CRM paper, Theorem 3.3). Taps of one level do not depend on each other and are also tried as one stacked
tap.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lipbounds._form.lure import LureForm, multiplicity, proved_slopes
from lipbounds._form.program import Tap
from lipbounds._form.steps import StaticArray
from lipbounds._gain.blocks import HostForm, Node, Pair, TapScaling
from lipbounds._gain.device_blocks import proved_on_device
from lipbounds._gain.live import live_outputs
from lipbounds._gain.memory_budget import Budget, proofs
from lipbounds._gain.side_by_side import side_by_side
from lipbounds._gain.wide_blocks import LIMIT, cut_norm, wide_norm
from lipbounds._norms import enclosures
from lipbounds._norms.banded_cholesky import Plan
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.rounding import add_up, gamma, mul_up, products_up
from lipbounds._text.progress import meter, proof_seconds, say
from lipbounds._triangle import refinement
from lipbounds._triangle.formed_blocks import LOOSE, BlockNorm, block_norm, proved, shorten
from lipbounds._triangle.refinement import wide_norms
from lipbounds.results import Part, weakest

#: Blocks whose smaller side is at most this are verified by `guarantee="auto"`; larger ones are probabilistic.
DENSE_LIMIT = 4096
#: Probability with which a probabilistic bound may fail, all its blocks together.
FAILURE = 1e-9
_WORTH_A_LOOK = 20.0  # estimated seconds of proofs above which rough norms tell first whether they are needed
_ABOVE = 1.0 + 1e-9  # a bound with centre 0 that is larger by this factor is left out
STORED_ENTRIES = 2**28  # a scaling keeps all blocks: 2 GB

_HOSTS: weakref.WeakKeyDictionary[LureForm, HostForm] = weakref.WeakKeyDictionary()


def host_form(form: LureForm) -> HostForm:
    """The matrices of a form, kept as long as the form lives."""
    host = _HOSTS.get(form)
    if host is None:
        host = _HOSTS[form] = HostForm(form)
    return host


def loop_transform(
    form: LureForm, norm: float, *, centred: bool, live: bool = False
) -> tuple[TapScaling, ...]:
    """Per tap v = c y + q w with ||w|| <= ||e y|| in differences, c the middle of the slopes (or 0).

    The radius is rounded up, so the interval [a, b] lies in [c - q, c + q] in real arithmetic. A group tap has c = 0,
    q = 1 and e_i = n_i^(1/p), n_i the number of groups entry i belongs to: each group is 1-Lipschitz. With `live`, the
    outputs of taps that do not matter (`live_outputs`) have c = q = 0, and inputs that only they read e = 0.
    """
    out = []
    masks: Sequence[np.ndarray | None] = live_masks(form) if live else [None] * len(form.taps)
    for k, (tap, mask) in enumerate(zip(form.taps, masks, strict=True)):
        if tap.groups is not None:
            q = np.ones(tap.size_out) if mask is None else mask.astype(np.float64)
            out.append(TapScaling(None, q, _multiplicity_factor(tap, norm, mask)))
            continue
        lower, upper = proved_slopes(form, k)
        c = (lower + upper) / 2 if centred else np.zeros(tap.size_in)
        r = np.maximum(upper - c, c - lower)
        # Multiples of 2^-20 below 2^20 are added without rounding; anything else is rounded up.
        exact = np.all(
            [(np.abs(s) < 2.0**20) & (s * 2.0**20 == np.round(s * 2.0**20)) for s in (lower, upper)], axis=0
        )
        r = np.where(exact | (r == 0) & (lower == upper) | (not centred), r, np.nextafter(r, np.inf))
        e = np.ones(tap.size_in)
        if mask is not None:
            c, r, e = np.where(mask, c, 0.0), np.where(mask, r, 0.0), mask.astype(np.float64)
        out.append(TapScaling(c if c.any() else None, r, e))
    return tuple(out)


def live_masks(form: LureForm) -> list[np.ndarray | None]:
    """Per tap the mask of its outputs that matter, None where all of them do."""
    host = host_form(form)
    if host.live is None:
        still = [np.zeros(tap.size_out, bool) for tap in form.taps]
        for k, tap in enumerate(form.taps):
            if tap.groups is None:
                lower, upper = proved_slopes(form, k)
                still[k] = (lower == 0.0) & (upper == 0.0)
        host.live = live_outputs(host, still)
    return [None if mask.all() else mask for mask in host.live]


def _multiplicity_factor(tap: Tap, norm: float, live: np.ndarray | None = None) -> np.ndarray:
    """n_i^(1/p); with a mask of outputs that matter of groups with one output, n_i counts the groups of these."""
    n = multiplicity(tap)
    if live is not None and tap.groups is not None and tap.kind != "sort":
        n = multiplicity(replace(tap, groups=StaticArray(tap.groups.array[live])))
    if norm == 2:
        root = np.sqrt(n)
        square = np.array([math.isqrt(int(i)) ** 2 == int(i) for i in n.ravel()]).reshape(n.shape)
        return np.where(square, root, np.nextafter(root, np.inf))
    return n if norm == 1 else np.minimum(n, 1.0)


def partitions(form: LureForm) -> list[tuple[Node, ...]]:
    """Partitions of the taps into nodes of the recursion: one by one, and stacked by level (if that differs)."""
    single = tuple((k,) for k in range(len(form.taps)))
    levels: dict[int, list[int]] = {}
    for k, tap in enumerate(form.taps):
        levels.setdefault(tap.level, []).append(k)
    stacked = tuple(tuple(levels[level]) for level in sorted(levels))
    return [single] if len(stacked) == len(single) else [single, stacked]


def node_name(form: LureForm, node: Node, *, source: bool) -> str:
    if not node:
        return "input" if source else "output"
    return "+".join(f"{form.taps[k].name}[{k}]" for k in node)


def _block_name(form: LureForm, pair: Pair) -> str:
    return f"{node_name(form, pair[0], source=True)} to {node_name(form, pair[1], source=False)}"


@dataclass(frozen=True)
class Request:
    """Options of a run of the recursion."""

    norm: float = 2
    guarantee: str = "auto"
    seed: int = 0
    failure: float = FAILURE
    budget: Budget | None = None


def structure(host: HostForm, nodes: Sequence[Node], scalings: Sequence[TapScaling]) -> list[Pair]:
    """Pairs (source, target) of nodes joined by a path; targets are nodes (the output is treated by rows)."""
    pairs = []
    for j, source in enumerate([(), *nodes]):
        reached = host.coming_from({source}, scalings)
        for target in nodes[j:]:
            if any(i in reached for k in target for i in host.program.taps[k].inputs) and target != source:
                pairs.append((source, target))
    return pairs


def block_norms(
    form: LureForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    request: Request,
    ends: Mapping[Node, float] | None = None,
) -> dict[Pair, BlockNorm]:
    """The norm of each block: proved, or probabilistic where the size rule or the budget requires it.

    ends: norms of the blocks to the output, by source; they tell which of the probabilistic norms matter.
    """
    host = host_form(form)
    found: dict[Pair, BlockNorm] = {}
    if request.norm == 2 and request.guarantee in ("auto", "verified"):
        limit = math.inf if request.budget is None else request.budget.limit
        for pair, value in proved_on_device(host, pairs, scalings, limit).items():
            found[pair] = BlockNorm(value, "verified", "residual on a GPU", host.block_shape(pair))
    if request.budget is not None:
        return _within_budget(form, pairs, scalings, request, request.budget, found)
    forced = request.norm != 2 or request.guarantee == "verified"
    formed: list[Pair] = []  # proved from their matrices
    wide: list[Pair] = []
    for pair in (pair for pair in pairs if pair not in found):
        small = min(host.block_shape(pair)) <= DENSE_LIMIT
        cut = cut_norm(host, pair, scalings) if forced and request.norm == 2 and not small else None
        if cut is not None:
            found[pair] = BlockNorm(*cut[:3], host.block_shape(pair))
        elif forced or (small and request.guarantee == "auto"):
            formed.append(pair)
        else:
            wide.append(pair)
    name = partial(_block_name, form)
    one_by_one = proved(host, formed, scalings, request.norm, name)
    found |= {pair: bound for pair, (bound, _) in one_by_one.items()}
    if wide:
        known = {pair: one.value for pair, one in found.items()}
        quick = request.guarantee != "probabilistic"
        bounds = wide_norms(
            host, wide, scalings, known, ends or {}, request.seed, request.failure, quick, name
        )
        found |= {pair: BlockNorm(*bound[:3], host.block_shape(pair)) for pair, bound in bounds.items()}
    loose = [pair for pair, (bound, error) in one_by_one.items() if error > LOOSE * bound.value]
    if loose:
        shorten(host, pairs, scalings, loose, found, request.norm)
    return found


def _within_budget(
    form: LureForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    request: Request,
    budget: Budget,
    known: Mapping[Pair, BlockNorm],
) -> dict[Pair, BlockNorm]:
    """`block_norms` within a budget: proofs that fit it, else the Fourier bound of a convolution, else Golub-Kahan.

    Blocks whose norms are `known` keep them. The Fourier bound is verified but not tight: it is taken where proofs are
    forced, or where it keeps the whole bound verified, that is where every block without a proof has one.
    """
    host = host_form(form)
    size = host.block_shape
    forced = request.guarantee == "verified"
    found = dict(known)
    left: dict[Pair, tuple[float, int] | None] = dict.fromkeys(p for p in pairs if p not in known)
    if request.guarantee != "probabilistic":
        with meter(len(left), 0.0) as advance:

            def prove(block: Enclosure, plan: Plan) -> float:
                advance(plan.name, 0.0)
                return block_norm(host, block, 2, plan)

            proved, left = proofs(
                host,
                list(left),
                scalings,
                budget,
                forced=forced,
                prove=prove,
                name=partial(_block_name, form),
            )
        for pair, proof in proved.items():
            found[pair] = BlockNorm(proof.value, "verified", proof.how, proof.shape)
        loose = [pair for pair, proof in proved.items() if proof.error > LOOSE * proof.value]
        # Shorter blocks are formed all at once: only where they fit as dense arrays.
        if loose and not left and 8 * sum(math.prod(size(pair)) for pair in pairs) <= budget.limit:
            shorten(host, pairs, scalings, loose, found, 2)
    whole = all(bound is not None for bound in left.values())
    for place, (pair, bound) in enumerate(left.items()):
        say(f"norm of {_block_name(form, pair)}")
        if whole and bound is not None:
            how = f"Fourier transform, {budget.spend(bound[1])}"
            found[pair] = BlockNorm(bound[0], "verified", how, size(pair))
            continue
        most = budget.steps(sum(size(pair)))
        one = wide_norm(
            host,
            pair,
            scalings,
            seed=request.seed + place,
            failure=request.failure / len(left),
            matrix_free=request.guarantee == "probabilistic",
            max_steps=most,
            limit=budget.limit,
        )
        found[pair] = BlockNorm(one.value, one.guarantee, f"{one.how}, {budget.spend(one.need)}", size(pair))
    return found


@dataclass(frozen=True)
class Triangle:
    """One run of the recursion.

    Args:
        value: of the whole network; per_class, pairwise: (K,), (K, K) or None.
        parts: the block norms used.
        reach: m_k per node, the constant of x -> y_k (1 for the input).
        outputs: norms of the blocks to the output, per source.
    """

    value: float
    per_class: np.ndarray | None
    pairwise: np.ndarray | None
    parts: tuple[Part, ...]
    guarantee: str
    failure: float
    reach: dict[Node, float] = field(default_factory=dict)
    outputs: dict[Node, float] = field(default_factory=dict)


def dual(norm: float) -> float:
    return {1: math.inf, 2: 2, math.inf: 1}[norm]


def recursion(
    form: LureForm,
    nodes: Sequence[Node],
    scalings: Sequence[TapScaling],
    request: Request,
    *,
    pairwise: bool,
    found: dict[Pair, BlockNorm] | None = None,
    rows: dict[Node, Enclosure] | None = None,
) -> Triangle:
    """The triangle recursion for one partition and one centre, every operation rounded up."""
    host = host_form(form)
    many = form.num_outputs > DENSE_LIMIT and request.norm == 2 and request.guarantee != "verified"
    many = many and not pairwise and rows is None
    if many:
        rows, ends = {}, _to_many_outputs(form, nodes, scalings, request)
    else:
        rows, ends = _to_outputs(host, nodes, scalings, request, rows)
    if found is None:
        # Probabilistic norms of blocks to the output have the other half of the failure probability.
        share = replace(request, failure=request.failure / 2) if many else request
        weights = {source: end.value for source, end in ends.items()}
        found = block_norms(form, structure(host, nodes, scalings), scalings, share, weights)
    reach: dict[Node, float] = {(): 1.0}
    parts: list[Part] = []
    sources = [(), *nodes]

    def part(source: Node, target: Node, norm: BlockNorm) -> None:
        a, b = node_name(form, source, source=True), node_name(form, target, source=False)
        parts.append(Part(a, b, norm.shape, norm.value, norm.guarantee, norm.how))

    for target in nodes:
        terms = []
        for source in sources:
            if (source, target) in found:
                block = found[source, target]
                part(source, target, block)
                terms.append(mul_up(block.value, reach[source]))
        reach[target] = add_up(*terms)
    terms = []
    outputs: dict[Node, float] = {}
    count = form.num_outputs if pairwise else 0
    classes, pairs = np.zeros(count), np.zeros((count, count))
    q = dual(request.norm)
    for source in (source for source in sources if source in ends):
        part(source, (), ends[source])
        outputs[source] = ends[source].value
        terms.append(mul_up(ends[source].value, reach[source]))
        if pairwise:
            row = rows[source].dense()
            classes += products_up(enclosures.enclosure_row_norms(row, q), reach[source])
            pairs += products_up(enclosures.enclosure_pair_norms(row, q), reach[source])
    grow = 1 + gamma(4 * (len(nodes) + 2))
    guarantee = weakest(p.guarantee for p in parts) if parts else "verified"
    failure = request.failure if guarantee == "probabilistic" else 0.0
    if form.assumed:
        guarantee = "assumed"
    return Triangle(
        add_up(*terms),
        products_up(classes, grow) if pairwise else None,
        products_up(pairs, grow) if pairwise else None,
        tuple(parts),
        guarantee,
        failure,
        reach,
        outputs,
    )


def _to_outputs(
    host: HostForm,
    nodes: Sequence[Node],
    scalings: Sequence[TapScaling],
    request: Request,
    rows: dict[Node, Enclosure] | None,
) -> tuple[dict[Node, Enclosure], dict[Node, BlockNorm]]:
    """(rows, norms) of the blocks to the output by source; rows are formed where they are not given."""
    if rows is None:
        rows = {source: block.T for source, block in host.backward((), [(), *nodes], scalings).items()}
    found = {}
    for source in [(), *nodes]:
        if source in rows:
            plan = enclosures.enclosure_plan(rows[source]) if request.norm == 2 else None
            how = "exact sums" if plan is None else _rows_way(plan, request)
            value = block_norm(host, rows[source], request.norm, plan)
            found[source] = BlockNorm(value, "verified", how, rows[source].shape)
    return rows, found


def _to_many_outputs(
    form: LureForm, nodes: Sequence[Node], scalings: Sequence[TapScaling], request: Request
) -> dict[Node, BlockNorm]:
    """Norms of the blocks to too many outputs for a dense proof: no array of shape (outputs, outputs) is formed."""
    host = host_form(form)
    sources = [source for source in [(), *nodes] if _reaches_output(host, source, scalings)]

    def norm(source: Node) -> BlockNorm:
        shape = host.block_shape((source, ()))
        if shape[1] <= DENSE_LIMIT:
            block = host.forward(source, [()], scalings)[()]
            plan = enclosures.enclosure_plan(block)
            how = _rows_way(plan, request)
            return BlockNorm(block_norm(host, block, 2, plan), "verified", how, shape)
        one = wide_norm(
            host,
            (source, ()),
            scalings,
            seed=request.seed + 2**20 + [(), *nodes].index(source),
            failure=request.failure / (2 * (len(nodes) + 1)),
            matrix_free=request.guarantee == "probabilistic",
            limit=LIMIT if request.budget is None else request.budget.limit,
        )
        return BlockNorm(*one[:3], shape)

    seconds = sum(proof_seconds(*host.block_shape((source, ()))) for source in sources)
    found: dict[Node, BlockNorm] = {}
    with side_by_side(norm, sources, seconds=seconds if request.budget is None else 0.0) as results:
        for source, one in results:
            say(f"norm of {_block_name(form, (source, ()))}")
            found[source] = one
    return found


def _reaches_output(host: HostForm, source: Node, scalings: Sequence[TapScaling]) -> bool:
    return host.program.output in host.coming_from({source}, scalings)


def _rows_way(plan: Plan, request: Request) -> str:
    """The name of the proof of the rows to the outputs, charged to the budget."""
    return plan.name if request.budget is None else f"{plan.name}, {request.budget.rows(plan.memory)}"


def _least(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.minimum(first, second)


def smaller(first: Triangle, second: Triangle) -> Triangle:
    """The best of two valid bounds: value, classes and pairs each on their own; parts of the smaller value."""
    best = first if first.value <= second.value else second
    pairs, classes = _least(first.pairwise, second.pairwise), _least(first.per_class, second.per_class)
    both = weakest([first.guarantee, second.guarantee]) if pairs is not None else best.guarantee
    # Which of the two is smaller depends on their random starts, so both must hold.
    failure = first.failure + second.failure if both != "verified" else 0.0
    return replace(best, per_class=classes, pairwise=pairs, guarantee=both, failure=failure)


def surely_above(form: LureForm, request: Request, best: Triangle) -> bool:
    """Whether it pays to find out, and every partition with centre 0 gives a bound above `best`; it proves nothing.

    With pairs in `best`, all constants of classes and pairs must be above, too.
    """
    host = host_form(form)
    scalings = loop_transform(form, request.norm, centred=False, live=True)
    for nodes in partitions(form):
        pairs = structure(host, nodes, scalings)
        pairs += [(source, ()) for source in [(), *nodes] if _reaches_output(host, source, scalings)]
        seconds = sum(proof_seconds(*host.block_shape(pair)) for pair in pairs)
        if request.norm != 2 or seconds < _WORTH_A_LOOK:
            return False
        value, reach = refinement.lower_estimate(host, nodes, pairs, scalings)
        if not value > best.value * _ABOVE:
            return False
        if best.pairwise is None or best.per_class is None:
            continue
        classes, apart = np.zeros_like(best.per_class), np.zeros_like(best.pairwise)
        for source, block in host.backward((), [(), *nodes], scalings).items():
            row = block.T.dense()
            classes += enclosures.enclosure_row_norms(row, 2) * reach.get(source, 0.0)
            apart += enclosures.enclosure_pair_norms(row, 2) * reach.get(source, 0.0)
        others = ~np.eye(len(apart), dtype=bool)
        if not ((classes > best.per_class * _ABOVE).all() and (apart > best.pairwise * _ABOVE)[others].all()):
            return False
    return True


def triangle(form: LureForm, request: Request, *, pairwise: bool, centred: bool) -> Triangle:
    """The recursion with one centre, over all partitions, the smallest result."""
    scalings = loop_transform(form, request.norm, centred=centred, live=True)
    best: Triangle | None = None
    ways = partitions(form)
    request = replace(request, failure=request.failure / len(ways))
    for nodes in ways:
        result = recursion(form, nodes, scalings, request, pairwise=pairwise)
        best = result if best is None else smaller(best, result)
    assert best is not None
    return best
