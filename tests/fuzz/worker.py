"""One process of `python -m tests.fuzz`."""

from __future__ import annotations

import random
import time
import warnings
from typing import Any


def work(number: int, seed: int, seconds: float, share: float, out: Any) -> None:
    """Check programs until the time is over, a share of them with lowered limits, and send what each showed."""
    import jax
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from .grammar import programs
    from .limits import drawn
    from .properties import check, minimised

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    warnings.simplefilter("ignore")
    end, known = time.monotonic() + seconds, set()

    def one(program: Any) -> None:
        if time.monotonic() > end:
            return
        started = time.monotonic()
        rng = random.Random(program.source())
        limits = drawn(rng) if rng.random() < share else ()
        report = check(program, limits)
        sources = {}
        for finding in report.findings:
            if finding.family not in known:
                known.add(finding.family)
                left = end - time.monotonic()
                small = minimised(program, finding.family, min(30.0, left), limits)
                sources[finding.family] = small.source() + f"# limits: {limits}\n"
        out.put((report, program.ops(), sources, time.monotonic() - started))

    batch = 0
    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    while time.monotonic() < end:
        run = settings(max_examples=25, phases=[Phase.generate], **options)(given(programs())(one))
        seeded(seed + 1000 * batch + number)(run)()
        batch += 1
        jax.clear_caches()  # every compiled program holds memory maps, and Linux allows a process 65 530
    out.put(None)
