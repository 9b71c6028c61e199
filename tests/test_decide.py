"""What `decide` finds of every ball, and what stays where it is interrupted or the memory ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import mlp, values
from test_margins import attained, certified

import lipbounds as lb
from lipbounds._margins import margins as verb
from lipbounds._margins import search
from lipbounds._margins.found import Found
from lipbounds._norms import factorised


def interrupting(monkeypatch, proofs):
    """Ctrl-C after so many proofs of the dual."""
    real, done = Found.proved, []

    def proved(self, *args):
        if len(done) == proofs:
            raise KeyboardInterrupt
        done.append(args)
        return real(self, *args)

    monkeypatch.setattr(Found, "proved", proved)


def test_ctrl_c_in_the_dual_keeps_what_is_proved(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x = np.random.default_rng(2).random((12, 6))
    y = values(form, x).argmax(axis=1)
    problem = verb.prepare(form, x, y, 0.15, box=(0.0, 1.0))
    whole = lb.margins(form, x, y, 0.15, box=(0.0, 1.0), iterations=50)
    interrupting(monkeypatch, 5)
    part = lb.margins(form, x, y, 0.15, box=(0.0, 1.0), iterations=50)
    assert whole.complete and not part.complete
    assert "interrupted: the dual is done for 5 of 24 margins" in repr(part)
    assert "5 of 24 margins" in part._repr_html_() and part._repr_html_().startswith("<pre>")
    assert ((problem.balls.local <= part.value) & (part.value <= whole.value)).all()
    assert 0 < (part.value > problem.balls.local).sum() <= 5
    problem = verb.prepare(form, x, y, 0.36, box=(0.0, 1.0))
    found = np.full(12, verb.OPEN, verb.WORDS)
    monkeypatch.undo()
    interrupting(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        verb.decide(problem, found)
    assert 0 < (found == "dual").sum() <= 2 and (found == verb.OPEN).any() and (found == "ellipsoids").any()
    monkeypatch.undo()
    interrupting(monkeypatch, 3)
    radii = lb.certified_radius(form, x, y, bound=lb.naive(form), local=lb.Local(box=(0.0, 1.0)), eps=0.36)
    assert not radii.complete and radii.counts["dual"] and radii.counts["interrupted"]
    assert (radii.certified(0.36) == np.isin(radii.outcome, ("global", *verb.PROOFS))).all()


def test_balls_with_counterexamples_are_given_up(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x = np.random.default_rng(2).random((40, 6))
    y = values(form, x).argmax(axis=1)
    for norm, eps, box in ((2, 0.5, (0.0, 1.0)), (np.inf, 0.2, None)):
        problem = verb.prepare(form, x, y, eps, norm=norm, box=box)
        lost = problem.counterexamples(np.arange(40))
        worst = attained(form, x, y, eps, norm, box).min(axis=1)
        assert not (lost & (worst > 0)).any() and lost.sum() >= 0.9 * (worst < 0).sum() > 5
        assert not problem.counterexamples(
            np.flatnonzero(certified(form, x, y, eps, norm=norm, box=box))
        ).any()
        asked = []
        monkeypatch.setattr(Found, "run", lambda self, pairs, a=asked, **_: a.extend(pairs))
        verdict = verb.decide(problem)
        monkeypatch.undo()
        assert {row for row, _ in asked} == set(np.flatnonzero(verdict == verb.OPEN))
        assert set(np.flatnonzero(verdict == "counterexample")) == set(np.flatnonzero(lost))


def test_a_proof_beyond_the_memory_is_left_out():
    form = mlp((6, 12, 10, 3), seed=3)
    x = np.random.default_rng(2).random((12, 6))
    y = values(form, x).argmax(axis=1)
    problem = verb.prepare(form, x, y, 0.3)
    found = lb.margins(form, x, y, 0.3, memory="1 kB")
    np.testing.assert_array_equal(found.value, problem.balls.local)
    assert "without the dual for 12 of 12 examples: its proofs take up to" in repr(found)
    radii = lb.certified_radius(form, x, y, bound=lb.naive(form), local=lb.Local(memory="1 kB"), eps=0.3)
    lost = radii.counts["counterexample"]
    assert radii.counts["failed"] == 12 - radii.certified(0.3).sum() - lost > 0
    assert any("without the dual for" in note for note in radii.notes)


def test_a_gradient_runs_one_factorisation_at_a_time():
    """XLA's thread pool on CPU can wait for itself where batched routines of LAPACK run beside each other."""
    form = mlp((6, 12, 10, 3))
    x = np.random.default_rng(1).random((1, 6))
    problem = verb.prepare(form, x, values(form, x).argmax(axis=1), 0.3)
    item, start = problem.item(0, int(problem.others(0)[0]))

    def loss(m):
        return search._loss(problem.net, item, m, 0.01)

    text = str(jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(start))
    assert text.count("= cholesky") == text.count("= triangular_solve") == len(form.taps)


@pytest.mark.slow
def test_the_derivative_of_the_inverse():
    a = np.random.default_rng(0).standard_normal((4, 4)) / 4
    with jax.enable_x64():

        def ours(m):
            P, log_det = factorised.positive_inverse(m @ m.T + jnp.eye(4))
            return P[0, 1] + (P * P).sum() + log_det

        def plain(m):
            P = jnp.linalg.inv(m @ m.T + jnp.eye(4))
            return P[0, 1] + (P * P).sum() - jnp.linalg.slogdet(P)[1]

        np.testing.assert_allclose(
            jax.grad(ours)(jnp.asarray(a)), jax.grad(plain)(jnp.asarray(a)), rtol=1e-10
        )
