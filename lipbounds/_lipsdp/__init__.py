"""LipSDP by ellipsoids and semidefinite programming, its proofs and its certificates."""
