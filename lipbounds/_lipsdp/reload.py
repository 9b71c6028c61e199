"""`lb.load_certificate`: a bound from its certificate, proved again and not searched for again."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from lipbounds._form.lure import LureForm, fingerprint
from lipbounds._lipsdp.certificate import check, read_certificate
from lipbounds._lipsdp.claims import bound_of
from lipbounds._text.calls import public
from lipbounds._text.progress import Progress
from lipbounds._text.tables import printable
from lipbounds.results import UpperBound


@public
def load_certificate(
    path: str | os.PathLike[str], form: LureForm, *, progress: Progress = True
) -> UpperBound:
    """The bound of a certificate, after everything that it claims is proved again from the form.

    The file is not trusted: this is `lb.verify_certificate`, and then the claims as an `UpperBound`, for
    `lb.certified_radius` and the like. Only the search for the multipliers is saved, which takes most of the time of
    `lb.lipsdp`.

    Args:
        path: a file that `lb.save_certificate` wrote.
        form: the network, from its weights.
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Returns:
        An UpperBound with the constants, pairs and guarantee of the certificate, which it carries; each number is at
        most 1e-9 (relative) above that of the bound that was saved.

    Raises:
        CertificateError: the reason: not a certificate, cut off, changed, for another network, or not proved.
        OSError: the file cannot be read. TypeError: no concrete form.

    Example:
        >>> import tempfile, lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lb.save_certificate(lb.lipsdp(form, pairwise=True), f"{folder}/bound")
        ...     bound = lb.load_certificate(f"{folder}/bound", form)
        >>> bound.guarantee, round(bound.value, 3), bound.pairwise.shape
        ('verified', 2.0, (2, 2))
    """
    begin = time.perf_counter()
    if not isinstance(form, LureForm):
        raise TypeError(f"load_certificate needs a LureForm from lb.trace, got {type(form).__name__}")
    claims = read_certificate(path)
    check(claims, form)
    return replace(
        bound_of(claims),
        seconds=time.perf_counter() - begin,
        notes=(f"proved again from the certificate {printable(Path(path).name)}",),
        network=fingerprint(form),
    )
