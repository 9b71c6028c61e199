"""LipSDP by ellipsoids and semidefinite programming, its proofs and its certificates."""

from lipbounds._lipsdp.certificate import check as check_certificate
from lipbounds._lipsdp.certificate import read_certificate

__all__ = ["check_certificate", "read_certificate"]
