"""The record and the page of `lipbounds forge`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from lipbounds._text import html_table
from lipbounds.analysis.figures import png
from lipbounds.analysis.forging_study import Claim, Study, power_of_two
from lipbounds.analysis.masking import MaskingChecks
from lipbounds.analysis.report import embedded, fill, write_page
from lipbounds.analysis.spectra_figures import ratios_figure, zeroed_figure

Json = dict[str, Any]
PAGE, RECORD, THRESHOLDS = "forged.html", "forged.json", "forged.safetensors"


def forging_record(
    found: Study, chosen: float, on: str, rows: Sequence[Claim], checks: MaskingChecks | None
) -> Json:
    """Plain data: the study, the c_r whose thresholds are saved and what it was chosen on, claims, checks."""
    return {
        **found.to_json(),
        "chosen": {"c_r": chosen, "on": on},
        "claims": [vars(row) for row in rows],
        "masking": None if checks is None else checks.to_json(),
    }


def write_forging_report(
    record: Json, found: Study, checks: MaskingChecks | None, folder: pathlib.Path
) -> pathlib.Path:
    """Write `forged.html` to `folder` (which exists); return its path."""
    one = next(row for row in found.rows if row.c_r == record["chosen"]["c_r"])
    figures = [zeroed_figure(one.diagnosis), ratios_figure(one.diagnosis)]
    header = ("claim", "verdict", "figures")
    page = fill(
        "forged.html.j2",
        record=record,
        chosen=power_of_two(one.c_r),
        study=found._repr_html_(),
        diagnosis=one.diagnosis._repr_html_(),
        masking=None if checks is None else checks._repr_html_(),
        claims=html_table(header, [[row[key] for key in header] for row in record["claims"]]),
        figures=[embedded(png(figure)) for figure in figures],
    )
    return write_page(folder / PAGE, page)
