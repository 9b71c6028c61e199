"""Certified robustness and Lipschitz bounds for any network written in JAX."""

from lipbounds._trace import from_weights as from_weights
from lipbounds._trace import register_activation as register_activation
from lipbounds._trace import trace as trace
from lipbounds._version import __version__ as __version__
from lipbounds.bound import Estimate as Estimate
from lipbounds.bound import LowerBound as LowerBound
from lipbounds.bound import UpperBound as UpperBound
from lipbounds.bracket import bracket as bracket
from lipbounds.certificate import save_certificate as save_certificate
from lipbounds.certificate import verify_certificate as verify_certificate
from lipbounds.compare import compare as compare
from lipbounds.empirical import empirical as empirical
from lipbounds.errors import CertificateError as CertificateError
from lipbounds.errors import UnsupportedError as UnsupportedError
from lipbounds.liplt import liplt as liplt
from lipbounds.lipsdp import lipsdp as lipsdp
from lipbounds.local import LocalBounds as LocalBounds
from lipbounds.local import local as local
from lipbounds.lure import LureForm as LureForm
from lipbounds.naive import naive as naive
from lipbounds.radius import Radii as Radii
from lipbounds.radius import certified_radius as certified_radius
