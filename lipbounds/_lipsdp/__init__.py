"""LipSDP by ellipsoids and semidefinite programming, its proofs and its certificates."""

from lipbounds._lipsdp.certificate import check as check_certificate
from lipbounds._lipsdp.certificate import load_certificate

__all__ = ["check_certificate", "load_certificate"]
