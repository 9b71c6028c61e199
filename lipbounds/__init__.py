"""Certified robustness and Lipschitz bounds for any network written in JAX."""

from lipbounds._trace import from_weights as from_weights
from lipbounds._trace import register_activation as register_activation
from lipbounds._trace import trace as trace
from lipbounds._version import __version__ as __version__
from lipbounds.errors import CertificateError as CertificateError
from lipbounds.errors import UnsupportedError as UnsupportedError
from lipbounds.lure import LureForm as LureForm
