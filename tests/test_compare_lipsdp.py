"""LipSDP in the table of all methods."""

import dataclasses
import importlib.util
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._comparison import compare as table

LIPSDP = ["lipsdp", "lipsdp-clarabel", "lipsdp-scs", "lipsdp-layer"]


@pytest.fixture
def solved(monkeypatch):
    """What was asked of lipsdp, which answers with the naive bound; there are no other methods."""
    asked = []
    monkeypatch.setattr(table, "METHODS", {name: table.METHODS[name] for name in LIPSDP})

    def fake(form, **options):
        asked.append(options)
        return dataclasses.replace(lb.naive(form, pairwise=options["pairwise"]), method="fake")

    monkeypatch.setattr(table, "lipsdp", fake)
    return asked


def net(*widths):
    rng = np.random.default_rng(0)
    return lb.from_weights(
        [(rng.standard_normal((b, a)) / np.sqrt(a)).astype(np.float32) for a, b in itertools.pairwise(widths)]
    )


def test_each_row_of_lipsdp_asks_for_what_its_name_says(solved):
    lb.compare(net(3, 4, 2), methods=LIPSDP, pairwise=True, guarantee="verified", seed=7)
    assert [(o["solver"], o["multipliers"]) for o in solved] == [
        ("recursion", "neuron"),
        ("clarabel", "neuron"),
        ("scs", "neuron"),
        ("recursion", "layer"),
    ]
    for options in solved:
        assert options["pairwise"] and options["guarantee"] == "verified" and options["seed"] == 7


def test_lipsdp_stands_between_what_is_attained_and_liplt():
    assert list(table.METHODS)[:6] == ["empirical", *LIPSDP, "liplt-optimized"]
    assert list(table.METHODS).index("liplt") < list(table.METHODS).index("naive")


@pytest.mark.parametrize(
    ("widths", "pairwise", "why"),
    [
        ((3, 30, 30, 3), True, ""),  # 60 neurons, 3 pairs
        ((3, 30, 31, 3), False, "61 neurons, more than 60"),
        ((3, 5, 4), True, "6 pairs of classes, more than 3"),
        ((3, 5, 4), False, ""),
    ],
)
def test_solvers_are_left_out_by_size_unless_they_are_named(solved, widths, pairwise, why):
    c = lb.compare(net(*widths), pairwise=pairwise)
    assert [r.method for r in c] == LIPSDP
    for name in ("lipsdp-clarabel", "lipsdp-scs"):
        assert c[name].kind == ("none" if why else "upper") and why in c[name].reason
        assert not why or f"methods=[{name!r}]" in repr(c)  # the table shows how to ask for it
        assert lb.compare(net(*widths), methods=[name], pairwise=pairwise)[name].kind == "upper"
    assert c["lipsdp"].kind == c["lipsdp-layer"].kind == "upper"


def test_group_taps_count_as_what_they_are_solved_as(solved):
    form = lb.trace(lambda x: jnp.max(x.reshape(21, 4), axis=1)[:2], jnp.zeros(84, jnp.float32))
    assert sum(tap.size_out for tap in form.taps) < 60  # but 3 relus for every maximum of 4
    assert "63 neurons" in lb.compare(form)["lipsdp-scs"].reason


def test_without_cvxpy_a_row_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cvxpy" else find(name))
    c = lb.compare(net(3, 4, 2), methods=["lipsdp-clarabel", "naive"])
    assert "pip install" in c["lipsdp-clarabel"].reason and c["naive"].kind == "upper"


@pytest.mark.slow
def test_solvers_agree_on_a_small_network():
    pytest.importorskip("cvxpy")
    c = lb.compare(net(3, 6, 5, 2), methods=["empirical", *LIPSDP])
    for name in ("lipsdp-clarabel", "lipsdp-scs"):
        assert c[name].value == pytest.approx(c["lipsdp"].value, rel=1e-3)
        assert c[name].result.method == name and c[name].guarantee == "verified"
    assert c["empirical"].value <= c["lipsdp"].value <= c["lipsdp-layer"].value


def test_progress_names_every_method_and_what_lipsdp_does():
    told = []
    lb.compare(net(3, 4, 2), methods=["lipsdp", "naive"], progress=told.append)
    assert told[0] == "lipsdp" and "lipsdp, network: " in told[1]
    assert told[-1] == "naive"  # its norms are among those that LipSDP has proved
    assert all(line.startswith("lipsdp, ") for line in told[1:-1])
    told.clear()
    lb.compare(net(3, 4, 2), methods=["naive"], progress=told.append)
    assert told[0] == "naive" and all(line.startswith("naive, norm of ") for line in told[1:]) and told[1:]


def test_the_report_measures_lipsdp_and_leaves_its_references_to_those_who_name_them():
    from lipbounds.analysis.experiment import LABELS, method_names, offered

    assert set(method_names()) == set(table.METHODS) - {"lipsdp-clarabel", "lipsdp-scs", "lipsdp-layer"}
    assert set(LABELS) == set(table.METHODS)
    assert offered(LIPSDP, 2) == offered(LIPSDP, 2, quick=True) == LIPSDP
    assert offered(LIPSDP, np.inf) == ["lipsdp", "lipsdp-layer"]
    assert offered(LIPSDP, np.inf, quick=True) == offered(LIPSDP, 1) == []


@pytest.mark.parametrize(("neurons", "quick"), [(301, True), (301, False), (300, True)])
def test_a_quick_report_limits_the_recursion_on_larger_networks(solved, monkeypatch, neurons, quick):
    from lipbounds.analysis.experiment import measure

    monkeypatch.setattr(lb, "lipsdp", table.lipsdp)
    form = net(3, neurons, 2)
    measure(form, np.zeros((1, 3)), np.zeros(1, int), norms=(2,), methods=("lipsdp",), quick=quick)
    solvers = [o.get("solver", lb.Recursion()) for o in solved]
    assert [s.iterations for s in solvers if s != "recursion"] == [45] * (quick and neurons > 300)
