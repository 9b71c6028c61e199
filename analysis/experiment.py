"""Bounds of one network by every method, as records of plain data.

A record is what JSON can hold. Rows of kind `upper`, `lower` and `estimate` are kept in different lists, so
that no script can take one for another. Numbers are not rounded here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import lipbounds as lb
from lipbounds._text import Progress, say
from lipbounds.analysis.attack_settings import reports
from lipbounds.results import Guarantee

Json = dict[str, Any]

NORMS: tuple[float, ...] = (2, math.inf, 1)
KINDS = ("upper", "lower", "estimate", "refused")
GRID = 241
_QUICK = 45  # iterations of LipSDP's recursion
_SMALL = 300  # neurons up to which LipSDP takes seconds anyway
LABELS = {
    "naive": "naive",
    "liplt": "LipLT",
    "liplt-aol": "LipLT + AOL",
    "liplt-sll": "LipLT + SLL",
    "liplt-optimized": "LipLT + optimised",
    "lipsdp-layer": "LipSDP, per layer",
    "lipsdp": "LipSDP",
    "lipsdp-clarabel": "LipSDP by Clarabel",
    "lipsdp-scs": "LipSDP by SCS",
    "liplt-estimate": "LipLT, estimated",
    "empirical": "slope found",
}
FROM_L2 = ", from l2"  # ends the label of a bound that `lb.in_norm` converts
_L2_ONLY = ("liplt-aol", "liplt-sll", "liplt-optimized", "lipsdp-clarabel", "lipsdp-scs")
_LIPSDP = ("lipsdp", "lipsdp-layer")
_L2_QUICK = ("empirical", "liplt-estimate")
_REFERENCES = ("lipsdp-layer", "lipsdp-clarabel", "lipsdp-scs")


def method_names() -> tuple[str, ...]:
    """The default methods: those of `LABELS` first, from the oldest bound to the tightest.

    LipSDP's reference solvers, which are no tighter and take as long or longer, run only if named.
    """
    ordered = dict.fromkeys([*(name for name in LABELS if name in lb.METHODS), *lb.METHODS])
    return tuple(name for name in ordered if name not in _REFERENCES)


def offered(names: Sequence[str], norm: float, quick: bool = False) -> list[str]:
    """Those of the methods that exist in `norm`: LipLT's scalings and CVXPY are for l2, LipSDP for l2 and l-inf.

    `quick` leaves out what takes long to compile for what it shows: in l-inf LipSDP, which is much tighter there, and
    outside l2 the slopes found and the estimate.
    """
    missing = () if norm == 2 else (*_L2_ONLY, *_LIPSDP) if norm == 1 or quick else _L2_ONLY
    missing = (*missing, *_L2_QUICK) if quick and norm != 2 else missing
    return [name for name in names if name not in missing]


def norm_key(norm: float) -> str:
    """The norm as the command line and JSON write it: "1", "2" or "inf", or another number."""
    return f"{norm:g}"


def result_kind(result: Any) -> str:
    """The kind of a result, "upper", "lower" or "estimate"; TypeError for anything else."""
    for kind, cls in (("upper", lb.UpperBound), ("lower", lb.LowerBound), ("estimate", lb.Estimate)):
        if isinstance(result, cls):
            return kind
    raise TypeError(f"not a result of this library: {type(result).__name__}")


def result_record(label: str, result: Any) -> Json:
    """One result as plain data, with its parts and, where there are pairs, all of them."""
    record: Json = {
        "label": label,
        "method": result.method,
        "norm": norm_key(result.norm),
        "value": result.value,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }
    if result.pairwise is not None:
        pair = result.worst_pair
        record["pairs"] = {
            "worst": None if pair is None else list(pair),
            "worst_value": None if pair is None else float(result.pairwise[pair]),
            "values": result.pairwise.tolist(),
        }
    if isinstance(result, lb.LowerBound):
        return record
    record["guarantee"] = result.guarantee
    record["failure_probability"] = result.failure_probability
    record["parts"] = [dataclasses.asdict(part) | {"shape": list(part.shape)} for part in result.parts]
    if result.pairwise is not None and len(result.pairwise) > 1:
        record["pairs"]["average"] = result.average_pair()
        record["pairs"]["average_sum"] = None if result.per_class is None else result.average_sum()
    return record


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity: None."""
    return float(value) if math.isfinite(value) else None


def radii_record(radii: Any, grid: Sequence[float], *, single: bool = False) -> Json:
    """Certified accuracy on a grid of eps, and the quartiles of the radii (None stands for infinity).

    With `single` also the radius of every image.
    """
    radius = np.asarray(radii.radius, dtype=np.float64)
    quartiles = np.quantile(radius, (0.25, 0.5, 0.75), method="lower") if radius.size else ()
    record = {
        "guarantee": radii.guarantee,
        "notes": list(radii.notes),
        "images": int(radius.size),
        "quartiles": [finite(q) for q in quartiles],
        "eps": [float(eps) for eps in grid],
        "accuracy": [float(radii.accuracy(float(eps))) for eps in grid],
    }
    return record | ({"radius": [finite(r) for r in radii.radius]} if single else {})


def without_pairs(bound: Any) -> Any:
    """The same bound, pairs forgotten: `certified_radius` then uses the constant that holds for any pair."""
    return dataclasses.replace(bound, pairwise=None, per_class=None)


def triangle_bound(form: Any, norm: float, **options: Any) -> lb.UpperBound:
    """LipLT with pairs, the least of its constants in `norm` and of those that it proves in l2."""
    found = [lb.liplt(form, norm=p, pairwise=True, **options) for p in dict.fromkeys((norm, 2))]
    # all but with guarantee="estimate"
    bounds = [bound for bound in found if isinstance(bound, lb.UpperBound)]
    return lb.in_norm(form, *bounds, norm=norm)


def eps_grid(radii: Sequence[Any]) -> list[float]:
    """eps from 0 to just beyond the largest finite radius of several `Radii`."""
    finite = [r[np.isfinite(r)] for r in (np.asarray(item.radius) for item in radii)]
    top = max((float(r.max()) for r in finite if r.size), default=0.0)
    return [float(eps) for eps in np.linspace(0.0, 1.02 * top if top > 0 else 1.0, GRID)]


@reports
def measure(
    form: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    norms: Sequence[float] = NORMS,
    methods: Sequence[str] | None = None,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    quick: bool = False,
    known: Mapping[str, Any] | None = None,
    progress: Progress = None,
) -> dict[str, list[Json]]:
    """Bound `form` by every method in every norm, certify images x (n, *in_shape) with labels y (n,).

    `quick` leaves LipSDP out in l-inf, and gives it fewer iterations on networks that are not small, which costs about
    1 %; slopes are found for the network alone, not for pairs of classes. `known` holds results by the names of their
    methods, which are not computed again. The row of the l2 bound with the largest median radius also has `local`, the
    radii by local bounds, none of which is below that of the bound.
    After the norm 2 its tightest bound is a row of every other norm, too, converted (`lb.in_norm`).
    A method that refuses becomes a "refused" row with its reason. GuaranteeError (by `lb.compare`) if a
    lower bound exceeds an upper bound of the same norm, since then one of the two is wrong.
    """
    rows: dict[str, list[Json]] = {kind: [] for kind in KINDS}
    tightest: tuple[str, lb.UpperBound] | None = None
    for norm in norms:
        key = norm_key(norm)
        labels, results = [], []
        for name in offered(method_names() if methods is None else methods, norm, quick):
            label = LABELS.get(name, name)
            say(f"{label}, norm {key}")
            # the search over pairs is slow, and one norm shows it
            pairwise = name != "empirical" or (norm == 2 and not quick)
            options: Json = {"norm": norm, "pairwise": pairwise, "guarantee": guarantee, "seed": seed}
            options["progress"] = False  # one line of its own for every method
            asked: list[Any] = [name]
            if known and name in known and known[name].norm == norm:
                asked = [known[name]]
            elif name == "lipsdp" and quick and sum(tap.size_out for tap in form.taps) > _SMALL:
                asked = [lb.lipsdp(form, solver=lb.Recursion(iterations=_QUICK), **options)]
            (row,) = lb.compare(form, x, methods=asked, **options)
            if row.kind == "none":
                rows["refused"].append({"label": label, "norm": key, "reason": row.reason})
            else:
                labels.append(label)
                results.append(row.result)
        if norm == 2:
            tightest = _tightest(labels, results)
        elif tightest is not None:
            labels.append(tightest[0] + FROM_L2)
            results.append(lb.in_norm(form, tightest[1], norm=norm))
        say(f"certified radii, norm {key}")
        compared = lb.compare(form, x, y, methods=results, norm=norm, pairwise=True, progress=False)
        certified: list[tuple[Json, Any]] = []
        for label, row in zip(labels, compared, strict=True):
            kind = result_kind(row.result)
            record = result_record(label, row.result)
            rows[kind].append(record)
            if kind != "upper":
                continue
            if row.radii is None:
                rows["refused"].append({"label": f"radii by {label}", "norm": key, "reason": row.reason})
                continue
            certified.append((record, row.radii))
            if label == LABELS["liplt"]:
                radii = lb.certified_radius(form, x, y, bound=without_pairs(row.result), progress=False)
                record["without_pairs"] = {}
                certified.append((record["without_pairs"], radii))
        grid = eps_grid([radii for _, radii in certified])
        for record, radii in certified:
            record["certified"] = radii_record(radii, grid, single=norm == 2)
        if norm == 2 and certified:
            say(f"local radii, norm {key}")
            best = best_certified(rows)
            bound = results[labels.index(best["label"])]
            radii = lb.certified_radius(
                form, x, y, bound=bound, local=True, guarantee=guarantee, seed=seed, progress=False
            )
            best["local"] = radii_record(radii, eps_grid([radii]), single=True)
    return rows


def _tightest(labels: Sequence[str], results: Sequence[Any]) -> tuple[str, lb.UpperBound] | None:
    """The upper bound with the least constants of pairs, on average, and its label."""
    upper = [pair for pair in zip(labels, results, strict=True) if result_kind(pair[1]) == "upper"]
    paired = [pair for pair in upper if pair[1].pairwise is not None and len(pair[1].pairwise) > 1]
    if paired:
        return min(paired, key=lambda pair: pair[1].average_pair())
    return min(upper, key=lambda pair: pair[1].value, default=None)


def best_certified(rows: Mapping[str, Any]) -> Json:
    """The row of the l2 bound with the largest median radius, infinity being None."""
    certified = [row for row in rows["upper"] if row["norm"] == "2" and "certified" in row]
    medians = [row["certified"]["quartiles"][1] for row in certified]
    best = max(
        zip(certified, medians, strict=True), key=lambda each: math.inf if each[1] is None else each[1]
    )
    return best[0]
