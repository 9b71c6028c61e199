"""The heart: the Lur'e form of a network, on which every method works."""

from lipbounds._form.lure import fingerprint

__all__ = ["fingerprint"]
