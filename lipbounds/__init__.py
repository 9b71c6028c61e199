"""Certified robustness and Lipschitz bounds for any network written in JAX."""

from lipbounds._comparison.bracket import bracket as bracket
from lipbounds._comparison.compare import compare as compare
from lipbounds._empirical.empirical import empirical as empirical
from lipbounds._form.lure import LureForm as LureForm
from lipbounds._lipsdp.certificate import save_certificate as save_certificate
from lipbounds._lipsdp.certificate import verify_certificate as verify_certificate
from lipbounds._lipsdp.lipsdp import lipsdp as lipsdp
from lipbounds._local.local import LocalBounds as LocalBounds
from lipbounds._local.local import local as local
from lipbounds._local.radius import Radii as Radii
from lipbounds._local.radius import certified_radius as certified_radius
from lipbounds._text.version import __version__ as __version__
from lipbounds._tracing.trace import from_weights as from_weights
from lipbounds._tracing.trace import register_activation as register_activation
from lipbounds._tracing.trace import trace as trace
from lipbounds._triangle.liplt import liplt as liplt
from lipbounds._triangle.naive import naive as naive
from lipbounds.errors import CertificateError as CertificateError
from lipbounds.errors import UnsupportedError as UnsupportedError
from lipbounds.results import Estimate as Estimate
from lipbounds.results import LowerBound as LowerBound
from lipbounds.results import UpperBound as UpperBound
