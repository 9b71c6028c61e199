"""Certified robustness and Lipschitz bounds for any network written in JAX.

`lipbounds.examples`, `lipbounds.training`, `lipbounds.analysis` and `lipbounds.interop` are imported where they are
first used.
"""

import importlib as _importlib
import typing as _typing

from lipbounds._comparison.bracket import bracket
from lipbounds._comparison.compare import METHODS, compare
from lipbounds._comparison.in_norm import in_norm
from lipbounds._empirical.empirical import empirical
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp.certificate import save_certificate, verify_certificate
from lipbounds._lipsdp.lipsdp import lipsdp
from lipbounds._lipsdp.reload import load_certificate
from lipbounds._lipsdp.solvers import Cvxpy, Recursion
from lipbounds._local.local import LocalBounds, local
from lipbounds._margins.margins import Margins, margins
from lipbounds._margins.radius import Local, Radii, certified_radius
from lipbounds._margins.stored import load, save_radii
from lipbounds._text.version import __version__
from lipbounds._tracing.trace import from_weights, register_activation, trace
from lipbounds._triangle.liplt import liplt
from lipbounds._triangle.naive import naive
from lipbounds.errors import CertificateError, UnitsWarning, UnsupportedError
from lipbounds.results import Estimate, LowerBound, UpperBound

if _typing.TYPE_CHECKING:
    from lipbounds import analysis, examples, interop, training

__all__ = [
    "METHODS",
    "CertificateError",
    "Cvxpy",
    "Estimate",
    "Local",
    "LocalBounds",
    "LowerBound",
    "LureForm",
    "Margins",
    "Radii",
    "Recursion",
    "UnitsWarning",
    "UnsupportedError",
    "UpperBound",
    "__version__",
    "analysis",
    "bracket",
    "certified_radius",
    "compare",
    "empirical",
    "examples",
    "from_weights",
    "in_norm",
    "interop",
    "liplt",
    "lipsdp",
    "load",
    "load_certificate",
    "local",
    "margins",
    "naive",
    "register_activation",
    "save_certificate",
    "save_radii",
    "trace",
    "training",
    "verify_certificate",
]

_LATER = ("analysis", "examples", "interop", "training")


def __getattr__(name: str) -> _typing.Any:
    if name in _LATER:
        return _importlib.import_module(f"lipbounds.{name}")
    raise AttributeError(f"module 'lipbounds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
