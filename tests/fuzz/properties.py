"""What must hold for every program; `check` returns what does not."""

from __future__ import annotations

import contextlib
import math
import random
import re
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lipbounds as lb
from lipbounds.errors import CertificateError, UnsupportedError

from .limits import Limits, lowered
from .program import Program
from .search import Pairs, Reference

try:
    from .rational import attained_jacobian, exceeds
except (
    ModuleNotFoundError
) as error:  # `python -m tests.fuzz` on a machine without python-flint: the rest is checked
    if error.name != "flint" or "pytest" in sys.modules:
        raise
    attained_jacobian = None

PACKAGE = Path(lb.__file__).parent
#: What may be said of an accepted program: numbers outside float64's range, of extreme networks only.
OUT_OF_RANGE = re.compile(r"range of float64|too (large|small)|not finite|overflow|rescale")


@dataclass(frozen=True)
class Finding:
    """kind: "break" (something false was said) or "foreign" (an error that is not the library's own)."""

    kind: str
    what: str

    @property
    def family(self) -> str:
        """Of findings that are likely one: the text without its numbers."""
        text = re.sub(r"[-+]?\d[\d.e+-]*", "#", self.what.splitlines()[0])
        return self.kind + ": " + (text.split(": ", 1)[-1] if self.kind == "foreign" else text)[:90]


@dataclass
class Report:
    """What one program showed."""

    findings: list[Finding] = field(default_factory=list)
    refused: str = ""
    checks: int = 0

    def check(self, holds: Any, what: str) -> None:
        self.checks += 1
        if not holds:
            self.findings.append(Finding("break", what))


class _Stop(Exception):
    """A verb raised: noted already, what needs its result is left out."""


def _own(error: BaseException) -> bool:
    """Raised by the library on purpose: of its own types, from its own files, with words."""
    if type(error) not in (ValueError, UnsupportedError, CertificateError) or not str(error).strip():
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE.name in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {str(error)[:300]}"


class Checker:
    """One program, its form, and a plan of what to try (drawn from its own source, so that it can be run again)."""

    def __init__(self, program: Program, limits: Limits = ()) -> None:
        self.program, self.limits, self.report = program, limits, Report()
        self.seed = zlib.crc32(program.source().encode())
        self.rng = random.Random(self.seed)
        self.extreme = program.largest_constant > 1e20 or any("e-30" in s.text for s in program.steps)
        self.tolerance = program.tolerance

    def run(self) -> Report:
        self.kept = b""
        self.strict = self.rng.random() < 0.05
        with lowered(self.limits), jax.enable_x64(self.program.double), contextlib.suppress(_Stop):
            self.trace()
            self.bounds()
            for part in (
                self.evaluates,
                self.exactly,
                self.slopes,
                self.local,
                self.radii,
                self.certificate,
                self.texts,
            ):
                with contextlib.suppress(_Stop):
                    part()
        if self.kept:
            with jax.enable_x64(self.program.double), contextlib.suppress(_Stop):
                self.verb("certificate, traced anew", lambda: self.verified(self.kept))
        return self.report

    def errors(self) -> contextlib.AbstractContextManager[Any]:
        """A user's setting of NumPy, now and then, under which the library has to work."""
        return np.errstate(all="raise") if self.strict else contextlib.nullcontext()

    def verified(self, certificate: bytes) -> bool:
        """Whether a certificate verifies with the usual limits and for a form of which nothing is known yet."""
        form = lb.trace(self.program.function(), self.spec)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "certificate"
            path.write_bytes(certificate)
            return lb.verify_certificate(path, form)

    def verb(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a verb that has to work."""
        self.report.checks += 1
        try:
            with self.errors():
                return call()
        except Exception as error:
            if not (self.extreme and _own(error) and OUT_OF_RANGE.search(str(error))):
                self.report.findings.append(Finding("foreign", f"{name}: {_where(error)}"))
            raise _Stop from error

    # -- the form and its bounds --------------------------------------------------------------------------------------

    def trace(self) -> None:
        self.spec = jax.ShapeDtypeStruct(self.program.shape, jnp.dtype(self.program.dtype))
        try:
            with self.errors():
                self.form = lb.trace(self.program.function(), self.spec)
        except Exception as error:
            self.report.checks += 1
            if not _own(error):
                self.report.findings.append(Finding("foreign", f"trace: {_where(error)}"))
            first = error.items[0].primitive if isinstance(error, UnsupportedError) else str(error)[:60]
            self.report.refused = str(first)
            raise _Stop from error

    def bounds(self) -> None:
        form, rng = self.form, self.rng
        self.found: dict[str, lb.UpperBound] = {}
        for p in (2, 1, math.inf):
            for name, verb in (("naive", lb.naive), ("liplt", lb.liplt)):
                self.found[f"{name} {p}"] = self.verb(
                    name, lambda v=verb, q=p: v(form, norm=q, pairwise=True)
                )
        scaling = rng.choice(["aol", "sll", "optimized"])
        if rng.random() < 0.3:
            name = f"liplt {scaling} 2"
            self.found[name] = self.verb(name, lambda: lb.liplt(form, scaling=scaling, pairwise=True))
        with contextlib.suppress(_Stop):
            pairs = rng.random() < 0.4  # a proof for each pair
            self.found["lipsdp 2"] = self.verb("lipsdp", lambda: lb.lipsdp(form, pairwise=pairs))
        if rng.random() < 0.2:
            with contextlib.suppress(_Stop):
                self.found["lipsdp-layer 2"] = self.verb(
                    "layer", lambda: lb.lipsdp(form, multipliers="layer")
                )
        if rng.random() < 0.06:  # compiles for seconds
            with contextlib.suppress(_Stop):
                norm = math.inf
                self.found["lipsdp inf"] = self.verb(
                    "lipsdp inf", lambda: lb.lipsdp(form, norm=norm, pairwise=True)
                )
        known = list(self.found.values())
        for p in (2, 1, math.inf):
            some = rng.sample(known, min(len(known), 2))
            self.found[f"in_norm {p}"] = self.verb(
                "in_norm", lambda q=p, b=some: lb.in_norm(form, *b, norm=q)
            )
        for p in (2, 1, math.inf):
            chain = [self.found[f"{m} {p}"] for m in ("naive", "liplt", "lipsdp") if f"{m} {p}" in self.found]
            # on a device the last digits depend on what is asked with it
            spare = 1e-12 if self.limits else 0.0
            for better, worse in zip(chain[1:], chain, strict=False):
                what = f"order, norm {p}: {better.method} {better.value!r} > {worse.method} {worse.value!r}"
                self.report.check(better.value <= worse.value * (1 + spare), what)
        for name, bound in self.found.items():
            self.report.check(
                math.isfinite(bound.value) and bound.value >= 0, f"{name}: value {bound.value!r}"
            )
        self.reference = Reference(self.program, self.found["naive 2"].value, self.seed)

    def evaluates(self) -> None:
        """The form is the user's function, in float64."""
        x = self.reference.points()[:24]
        x = x[np.abs(x).max(axis=1) < 1e3]
        theirs = self.reference.values(x)

        def ours() -> np.ndarray:
            with jax.enable_x64(True):
                run = jax.jit(
                    jax.vmap(lambda v: self.form.evaluate(v.reshape(self.form.in_shape), jnp.float64))
                )
                return np.asarray(run(jnp.asarray(x, jnp.float64)))

        mine = self.verb("evaluate", ours)
        good = np.isfinite(theirs).all(axis=1)
        size = np.abs(theirs).max(axis=1) + self.reference.growth * (
            np.abs(x).max(axis=1) + self.reference.constant
        )
        worst = np.max((np.abs(mine - theirs).max(axis=1) / np.maximum(size, 1e-300))[good], initial=0.0)
        self.report.check(
            worst <= self.tolerance, f"form.evaluate differs from the function by {worst:.3g} (relative)"
        )

    # -- attained slopes ----------------------------------------------------------------------------------------------

    def held(self, name: str, bound: Any, pairs: Pairs, norm: float) -> None:
        most = pairs.slope(norm)
        slack = 1.0 + self.tolerance
        self.report.check(
            most <= bound.value * slack + 1e-300, f"{name}: slope {most!r} attained, bound {bound.value!r}"
        )
        if bound.pairwise is None:
            return
        gaps = pairs.pair_slopes(norm)
        # A pair's slope may be far below those it is the difference of: JAX's rounded constants count by the latter.
        over = gaps - bound.pairwise * (1 + 1e-9) - (self.tolerance - 1e-9) * bound.value
        self.report.check(
            (over <= 1e-300).all(), f"{name}: pair slopes attained above the bound by {over.max():.3g}"
        )

    def exactly(self) -> None:
        """Jacobians of piecewise linear programs, in rational arithmetic: no rounding is forgiven."""
        if self.extreme or attained_jacobian is None:
            return
        for x in self.reference.points(8)[[1, 4]]:
            jacobian = self.verb("exact", lambda x=x: attained_jacobian(self.form, x))
            if jacobian is None:
                continue
            one = x.reshape(1, *self.form.in_shape)
            ball = self.verb("local", lambda one=one: lb.local(self.form, one, 1e-3, pairwise=True))
            for name, bound in [*self.found.items(), ("local", ball[0])]:
                wrong = exceeds(jacobian, bound)
                self.report.check(not wrong, f"{name}, exactly: {wrong}")

    def slopes(self) -> None:
        pairs = self.reference.search()
        for name, bound in self.found.items():
            self.held(name, bound, pairs, bound.norm)

    def local(self) -> None:
        norm = self.rng.choice([2, 2, math.inf])
        x = self.reference.points(3) * 0.3
        x[2] = self.reference.points(8)[7 if self.rng.random() < 0.3 else 3]
        x = x[np.isfinite(self.reference.values(x)).all(axis=1)]  # far out a program may overflow
        if not len(x):
            return
        eps = np.array([self.rng.choice([1e-3, 0.1, 1.0, 10.0]) for _ in x])
        shaped = x.reshape(-1, *self.form.in_shape)
        ball = self.verb("local", lambda: lb.local(self.form, shaped, eps, norm=norm, pairwise=True))
        self.ball = ball
        for i in range(len(x)):
            bound = self.verb("local[i]", lambda i=i: ball[i])
            self.held(f"local {norm}", bound, self.reference.inside(x[i], float(eps[i]), norm), norm)

    # -- radii --------------------------------------------------------------------------------------------------------

    def radii(self) -> None:
        names = [n for n in self.found if self.found[n].pairwise is not None]
        name = self.rng.choice(names)
        bound, form = self.found[name], self.form
        near: bool | lb.Local = bound.norm != 1 and self.rng.choice([False, True, lb.Local(margins=True)])
        x = self.reference.points(4)
        z = self.reference.values(x)
        x, z = x[np.isfinite(z).all(axis=1)], z[np.isfinite(z).all(axis=1)]
        if form.num_outputs < 2 or not len(x):
            return
        y = np.argmax(z, axis=1)
        shaped = x.reshape(-1, *form.in_shape)
        word = " by the dual" if isinstance(near, lb.Local) else " local" if near else ""
        what = f"certified_radius {name}{word}"
        radii = self.verb(what, lambda: lb.certified_radius(form, shaped, y, bound, local=near))
        self.radii_ = radii
        r = np.asarray(radii.radius)
        self.report.check((r >= 0).all() and not np.isnan(r).any(), f"{what}: radii {r}")
        for i in np.flatnonzero(r > 0)[:3]:
            radius = float(min(r[i], 1e6))
            margin, where = self.reference.attack(x[i], int(y[i]), radius, bound.norm)
            slack = (self.tolerance - 1e-9) * (np.abs(z[i]).max() + bound.value * radius)
            flip = f"{what}: radius {r[i]!r} at {x[i].tolist()}, margin {margin:.3g} at {where.tolist()}"
            self.report.check(margin >= -slack, flip)

    # -- certificates and texts ---------------------------------------------------------------------------------------

    def certificate(self) -> None:
        bound = self.found.get("lipsdp 2")
        if bound is None or bound.certificate is None or self.rng.random() > 0.3:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "certificate"
            self.verb("save_certificate", lambda: lb.save_certificate(bound, path))
            self.report.check(
                self.verb("verify_certificate", lambda: lb.verify_certificate(path, self.form)), "false"
            )
            self.kept = path.read_bytes()

    def texts(self) -> None:
        shown = [self.form, *self.found.values(), getattr(self, "ball", None), getattr(self, "radii_", None)]
        shown += [b.certificate for b in self.found.values() if b.certificate is not None]
        for thing in shown:
            if thing is None:
                continue
            text = self.verb("repr", lambda t=thing: repr(t))
            self.report.check(text.strip(), f"empty repr of {type(thing).__name__}")
            if hasattr(thing, "_repr_html_"):
                html = self.verb("_repr_html_", lambda t=thing: t._repr_html_())
                self.report.check(
                    "<img" not in html, f"_repr_html_ of {type(thing).__name__} lets a name through"
                )


def check(program: Program, limits: Limits = ()) -> Report:
    """All properties of one program, with these limits of the library lowered."""
    return Checker(program, limits).run()


def minimised(program: Program, family: str, seconds: float = 30.0, limits: Limits = ()) -> Program:
    """A smaller program with a finding of the same family: it ends earlier, or lacks steps."""
    end = time.monotonic() + seconds
    while True:
        n = len(program.steps)
        smaller = [program.upto(k) for k in range(n - 1)] + [program.without(k) for k in range(n - 1, -1, -1)]
        for other in smaller:
            if time.monotonic() > end:
                return program
            if other is not None and len(other.pruned().steps) < n and _shows(other.pruned(), family, limits):
                program = other.pruned()
                break
        else:
            return program


def _shows(program: Program, family: str, limits: Limits) -> bool:
    try:
        return any(f.family == family for f in check(program, limits).findings)
    except Exception:  # a smaller program need not be a program
        return False
