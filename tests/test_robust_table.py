"""The table of robust networks: exact on a linear network, ordered on others, and nothing claimed without proof."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds.analysis import robust_table
from lipbounds.analysis.figures import png
from lipbounds.analysis.robust_table import robust_figure, robust_record, robust_text
from lipbounds.errors import GuaranteeError

EPS = [0.02, 0.1, 0.2]


def points(rng: np.random.Generator, n: int = 40, size: int = 5) -> np.ndarray:
    return (0.3 + 0.4 * rng.random((n, size))).astype(np.float32)


def test_a_linear_network_is_known_exactly(rng: np.random.Generator) -> None:
    """The robust accuracy in l-inf is the share of margins above eps ||w_0 - w_1||_1."""
    x = points(rng)
    w = rng.standard_normal((5, 2)).astype(np.float32)
    b = -(x.mean(axis=0) @ w)
    y = rng.integers(0, 2, len(x))
    y[:25] = np.argmax(x @ w + b, axis=1)[:25]

    def net(batch: jax.Array) -> jax.Array:
        return batch @ w + b

    across = (w[:, 1] - w[:, 0]).astype(np.float64)
    margin = (x @ across + b[1] - b[0]) * np.where(y == 1, 1, -1)
    record = robust_record(net, x, y, eps=EPS, attack="pgd", local=False)
    assert record["natural"] == np.mean(margin > 0) and record["refused"] is None
    for e in EPS:
        wanted = np.mean(margin > e * np.abs(across).sum())
        assert record["PGD"][str(e)] == record["certified"][str(e)] == wanted, e
    assert 0 < record["PGD"]["0.02"] < record["natural"]
    assert "AutoAttack" not in record
    text = robust_text({"linear": record})
    assert text.count("linear") == 3 and f"{100 * record['natural']:.2f}" in text
    assert png(robust_figure({"linear": record}))[:4] == b"\x89PNG"


def test_a_network_that_cannot_be_bounded_has_no_certificate(rng: np.random.Generator) -> None:
    x = points(rng)
    y = (x.sum(axis=1) > 2.5).astype(int)

    def net(batch: jax.Array) -> jax.Array:
        total = jnp.exp(jnp.square(batch)).sum(axis=1)  # no Lipschitz constant on the whole space
        return jnp.stack([jnp.zeros(len(batch)), total - total.mean() * 0 - 6.4], axis=1)

    record = robust_record(net, x, y, eps=[0.05], attack="pgd", local=False)
    assert record["refused"] and record["guarantee"] is None
    assert record["certified"] == {"0.05": 0.0} and record["PGD"]["0.05"] < record["natural"]
    assert robust_text({"net": record}).splitlines()[-1].endswith(" -")
    assert png(robust_figure({"net": record}))[:4] == b"\x89PNG"


def test_a_wrong_certificate_is_found(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = points(rng)
    w = rng.standard_normal((5, 2)).astype(np.float32)
    b = -(x.mean(axis=0) @ w)
    y = np.argmax(x @ w + b, axis=1)
    real = robust_table._certify

    def generous(*args: Any) -> Any:
        form, radii, refused = real(*args)
        return form, dataclasses.replace(radii, radius=3 * radii.radius), refused

    monkeypatch.setattr(robust_table, "_certify", generous)
    with pytest.raises(GuaranteeError, match="at l-inf distance"):
        robust_record(lambda batch: batch @ w + b, x, y, eps=EPS, attack="pgd", local=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": "fab"}, "attack must be one of pgd, autoattack"),
        ({"eps": []}, "eps must hold finite numbers"),
        ({"eps": [math.inf]}, "eps must hold finite numbers"),
        ({"norm": 1}, "norm 2 or inf"),
        ({"images": 0}, "images must be a whole number >= 1"),
    ],
)
def test_bad_input(rng: np.random.Generator, changes: dict[str, Any], words: str) -> None:
    # also where fewer images are taken
    with pytest.raises(ValueError, match="y must hold 40 integer labels"):
        robust_record(lambda batch: batch[:, :2], points(rng), np.zeros(39, int), eps=EPS, images=2)
    options = {"eps": EPS, **changes}
    with pytest.raises(ValueError, match=words):
        robust_record(lambda batch: batch[:, :2], points(rng), np.zeros(40, int), **options)
    with pytest.raises(ValueError, match="at least one network"):
        robust_text({})


def test_what_autoattack_refuses_is_refused_before_the_bounds(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_table, "_certify", None)
    with pytest.raises(ValueError, match="AutoAttack needs at least 4 classes"):
        robust_record(lambda batch: batch[:, :2], points(rng), np.zeros(40, int), eps=EPS)


@pytest.mark.slow
def test_the_columns_are_ordered(rng: np.random.Generator) -> None:
    x = points(rng)
    w, v = rng.standard_normal((5, 12)).astype(np.float32), rng.standard_normal((12, 4)).astype(np.float32)

    def net(batch: jax.Array) -> jax.Array:
        return jax.nn.relu((batch - 0.5) @ w) @ v

    y = np.asarray(net(x)).argmax(axis=1)
    for local in (False, True):
        record = robust_record(net, x, y, eps=EPS, local=local)
        assert record["natural"] == 1
        for e in map(str, EPS):
            assert record["certified"][e] <= record["AutoAttack"][e] <= record["PGD"][e] <= 1
        assert record["certified"]["0.02"] > 0
