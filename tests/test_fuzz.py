"""A fixed number of random programs, and what the grammar covers (`python -m tests.fuzz --minutes 30` for more)."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fuzz.grammar import OPS, SUPPORTED, Builder, program_of, programs
from fuzz.program import Program
from fuzz.properties import check, minimised
from hypothesis import HealthCheck, Phase, given, settings
from zoo import primitive_set

from lipbounds._tracing.jaxpr import flatten
from lipbounds._tracing.lowering import lower
from lipbounds._tracing.rules import ELEMENTWISE, RULES

PROGRAMS = 3
SETTINGS: Any = {
    "database": None,
    "deadline": None,
    "derandomize": True,
    "phases": [
        Phase.generate
    ],  # `minimised` makes failures small: a program takes a second, too long to shrink
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=PROGRAMS, **SETTINGS)
@given(programs())
def test_random_programs(program: Program) -> None:
    report = check(program)
    for finding in report.findings:
        small = minimised(program, finding.family)
        pytest.fail(f"{finding.kind}: {finding.what}\n\n{small.source()}", pytrace=False)
    assert report.checks


#: Primitives that no program of the grammar holds, and why.
ELSEWHERE = {
    "sharding_constraint": "needs a mesh of devices",
    "pvary": "only inside shard_map",
    "mesh_cast": "needs a mesh of devices",
    "reshard": "needs a mesh of devices",
    "scatter_add": "another name of scatter-add",
    "expand_dims": "another name of broadcast_in_dim and reshape",
    "entries": "an equation of the library's own, made while a program is flattened",
    "grouped": "an equation of the library's own, made while a program is flattened",
    "copy_p": "another name of copy",
    "interp": "an equation of our own, for a call of jnp.interp",
}


def _drawn(name: str, count: int) -> list[Program]:
    """Different programs of one step of this entry."""
    out: list[Program] = []
    rng, texts = random.Random(name), set()
    shapes = [(4,), (3, 4), (2, 4, 2), (4, 4), (6,), (2,), (1, 3)]
    for turn in range(4 * count + 7):
        builder = Builder(rng, shapes[turn % len(shapes)], "float32")
        if OPS[name].operands == 2:
            builder.add("first", "2.0 * {0}", (0,))
        if builder.step(OPS[name], tuple(range(OPS[name].operands))):
            if builder.steps[-1].text in texts:
                continue
            texts.add(builder.steps[-1].text)
            builder.add("output", "jnp.ravel({0})", (len(builder.values) - 1,))
            out.append(builder.program())
        if len(out) == count:
            break
    return out


def _flat(program: Program) -> Any:
    return flatten(
        lambda _, v: program.function()(v), (), jax.ShapeDtypeStruct(program.shape, jnp.dtype(program.dtype))
    )


@pytest.fixture(scope="module")
def seen() -> set[str]:
    return set()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_entries_have_a_form(name: str) -> None:
    drawn = _drawn(name, 3)
    assert drawn, "no shape fits"
    for program in drawn:
        lower(_flat(program))


@pytest.mark.slow
def test_every_rule_is_in_the_grammar() -> None:
    found: set[str] = set()
    missing = (set(RULES) | ELEMENTWISE) - set(ELSEWHERE)
    for count in (1, 4, 12):
        for name in OPS:
            for program in _drawn(name, count) if missing - found else ():
                spec = jax.ShapeDtypeStruct(program.shape, jnp.dtype(program.dtype))
                try:
                    found |= primitive_set(program.function(), spec)
                except jax.errors.ConcretizationTypeError:
                    pass  # Python control flow on values of x
    missing -= found
    assert not missing, f"the grammar draws no program with {sorted(missing)}"
    assert not set(ELSEWHERE) & found, "it does draw these: take them off the list"


def test_programs_are_functions_of_the_seed() -> None:
    assert program_of(7) == program_of(7)
    assert len({program_of(k).source() for k in range(30)}) == 30


def test_a_failure_prints_a_source_that_runs() -> None:
    program = program_of(3)
    names: dict[str, Any] = {}
    exec(program.source(), names)
    x = jnp.ones(program.shape, program.dtype)
    assert jnp.array_equal(names["make"]()(x), program.function()(x))
