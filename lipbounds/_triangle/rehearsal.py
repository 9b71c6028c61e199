"""What the bounds of a network will run on an accelerator, compiled ahead."""

from __future__ import annotations

from lipbounds._form.lure import LureForm
from lipbounds._gain.device_rehearsal import rehearse
from lipbounds._text import device
from lipbounds._text.calls import public
from lipbounds._text.progress import Progress
from lipbounds._triangle import recursion


def on_accelerator() -> bool:
    """Whether large proofs are computed on an accelerator unless a call says otherwise."""
    return device.accelerator("auto") is not None


@public
def compile_ahead(form: LureForm, *, progress: Progress = True) -> None:
    """Compile what `naive` and `liplt` will run on the accelerator for forms with these steps; it computes no bound.

    The weights do not matter, so this may be done while they are trained, in another thread. Without an accelerator
    nothing is done.
    """
    host = recursion.host_form(form)
    for centred in (True, False):
        scalings = recursion.loop_transform(form, 2, centred=centred, live=True)
        for nodes in recursion.partitions(form):
            rehearse(host, recursion.structure(host, nodes, scalings), scalings)
