"""The Lur'e form of a network: a linear map in feedback with activation layers. Every method works on it."""

from lipbounds._form.concrete import is_concrete
from lipbounds._form.lure import fingerprint

__all__ = ["fingerprint", "is_concrete"]
