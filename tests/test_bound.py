"""The three result types: what they accept, refuse, and say."""

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from lipbounds import results as module
from lipbounds._text.tables import (
    entry,
    html_table,
    markdown_table,
    percent,
    seconds_text,
    show,
    text_table,
)
from lipbounds.errors import CertificateError, GuaranteeError, Unsupported, UnsupportedError
from lipbounds.results import Estimate, LowerBound, Part, UpperBound, check_norm, weakest

PAIRS = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 2.5], [4.0, 2.5, 0.0]])
PART = Part("x", "relu", (4, 3), 1.25, "verified", "Cholesky 3 x 3")


def upper(value=3.0, **fields):
    return UpperBound(
        **{"value": value, "norm": 2, "guarantee": "verified", "method": "naive", "seconds": 0.5} | fields
    )


def estimate(value=3.0, **fields):
    return Estimate(**{"value": value, "norm": 2, "method": "naive", "seconds": 0.5} | fields)


def lower(value=1.0, **fields):
    return LowerBound(**{"value": value, "norm": 2, "method": "empirical", "seconds": 0.5} | fields)


MAKERS = [upper, estimate, lower]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, np.float64("nan")])
def test_value_must_be_finite_and_not_negative(make, bad):
    with pytest.raises(ValueError, match="finite number >= 0"):
        make(bad)


@pytest.mark.parametrize("make", MAKERS)
def test_value_may_be_zero_and_becomes_a_python_float(make):
    assert make(np.float32(0.0)).value == 0.0 and type(make(np.float32(2)).value) is float


@pytest.mark.parametrize("make", MAKERS)
def test_results_are_frozen(make):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().value = 1.0


@pytest.mark.parametrize("first", MAKERS)
@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("op", ["__lt__", "__le__", "__gt__", "__ge__"])
def test_order_exists_within_one_type_only(first, second, op):
    if first is second:
        assert getattr(first(1.0), op)(second(2.0)) == getattr(1.0, op)(2.0)
        assert getattr(first(2.0), op)(second(2.0)) == getattr(2.0, op)(2.0)
    else:
        with pytest.raises(TypeError, match="cannot be compared"):
            getattr(first(1.0), op)(second(2.0))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("number", [1.0, 1, np.float64(1.0), np.ones(3), "1"])
def test_numbers_are_not_bounds(make, number):
    for compare in (lambda a, b: a < b, lambda a, b: b < a, lambda a, b: a >= b, lambda a, b: b >= a):
        with pytest.raises(TypeError):
            compare(make(), number)


@pytest.mark.parametrize("make", MAKERS)
def test_norms_do_not_mix(make):
    with pytest.raises(TypeError, match=r"different norms \(l2, l1\)"):
        _ = make() < make(norm=1)


def test_no_common_public_type_and_no_equality_between_types():
    for a in (UpperBound, Estimate, LowerBound):
        for b in (UpperBound, Estimate, LowerBound):
            assert (a is b) == issubclass(a, b)
        assert all(base is object or base.__name__.startswith("_") for base in a.__mro__[1:])
    assert upper() != estimate() and upper() != upper()


def test_only_an_upper_bound_is_a_number():
    assert float(upper(2.5)) == 2.5
    for other in (estimate(), lower()):
        with pytest.raises(TypeError, match=r"\.value"):
            float(other)
        with pytest.raises(TypeError):
            UpperBound(other, 2, "verified", "naive", 0.1)
        with pytest.raises(TypeError):
            _ = upper() + other


def test_guarantees_cannot_claim_more_than_the_parts():
    weak = dataclasses.replace(PART, guarantee="probabilistic")
    with pytest.raises(ValueError, match="cannot be 'verified'"):
        upper(parts=(PART, weak))
    assert upper(guarantee="probabilistic", failure_probability=1e-9, parts=(PART, weak)).parts == (
        PART,
        weak,
    )
    with pytest.raises(ValueError, match="not an upper bound"):
        upper(guarantee="estimate")
    with pytest.raises(ValueError, match="'estimate'"):
        estimate(guarantee="verified")
    with pytest.raises(ValueError, match="guarantee must be one of"):
        upper(guarantee="certain")
    assert estimate().guarantee == "estimate"


def test_failure_probability_belongs_to_probabilistic_bounds():
    with pytest.raises(ValueError, match="failure_probability 0"):
        upper(failure_probability=1e-9)
    with pytest.raises(ValueError, match="states its failure_probability"):
        upper(guarantee="probabilistic")
    with pytest.raises(ValueError, match="no failure_probability"):
        estimate(failure_probability=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        upper(guarantee="probabilistic", failure_probability=1.0)


def test_weakest():
    assert weakest([]) == "verified"
    assert weakest(["verified", "assumed", "probabilistic"]) == "assumed"
    assert weakest(["estimate", "verified"]) == "estimate"


@pytest.mark.parametrize(
    ("norm", "want"), [(1, 1), (2.0, 2), (np.int64(2), 2), ("inf", math.inf), (np.inf, math.inf), ("1", 1)]
)
def test_norms_read(norm, want):
    assert check_norm(norm) == want and upper(norm=norm).norm == want


@pytest.mark.parametrize("norm", [3, 0, "fro", None, True, math.nan, [2], -math.inf])
def test_norms_refused(norm):
    with pytest.raises(ValueError, match="norm must be 1, 2 or inf"):
        check_norm(norm)


def test_pairs():
    b = upper(pairwise=PAIRS, per_class=[1.0, 2.0, 3.0])
    assert b.worst_pair == (0, 2)
    assert b.average_pair() == pytest.approx((1 + 4 + 2.5) / 3)
    assert b.average_sum() == pytest.approx((3 + 4 + 5) / 3)
    assert lower(pairwise=PAIRS).worst_pair == (0, 2)
    with pytest.raises(ValueError, match="read-only"):
        b.pairwise[0, 1] = 0.0
    mine = PAIRS.copy()
    kept = upper(pairwise=mine)
    mine[0, 2] = 0.0
    assert kept.pairwise[0, 2] == 4.0


def test_without_pairs():
    assert upper().worst_pair is None and upper(pairwise=[[0.0]]).worst_pair is None
    with pytest.raises(ValueError, match="pairwise=True"):
        upper().average_pair()
    with pytest.raises(ValueError, match="pairwise=True"):
        upper().average_sum()


@pytest.mark.parametrize(
    "bad",
    [
        np.ones((2, 3)),
        np.ones((2, 2)),
        [[0.0, 1.0], [2.0, 0.0]],
        [[0.0, -1.0], [-1.0, 0.0]],
        PAIRS * np.nan,
        [1.0, 2.0],
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_pairs_refused(make, bad):
    with pytest.raises(ValueError, match="pairwise must"):
        make(pairwise=bad)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[1.0, 2.0, 3.0]], [1.0, 2.0, -3.0], [1.0, np.inf, 0.0]])
def test_per_class_refused(bad):
    with pytest.raises(ValueError, match="per_class must"):
        upper(pairwise=PAIRS, per_class=bad)


@pytest.mark.parametrize("value", [3.0, 1 / 3, 1e-310, 1e200, 5e-324, 0.0])
def test_sqrt2_lies_above_the_real_number(value):
    got = upper(value).sqrt2()
    assert Fraction(got) ** 2 >= 2 * Fraction(value) ** 2
    assert got <= math.sqrt(2) * value * (1 + 1e-15) + 1e-323


def test_factor_of_a_pair_in_every_norm():
    assert upper(norm=1).any_pair() == 3.0 and upper(norm="inf").any_pair() == 6.0
    with pytest.raises(ValueError, match="l2 norm only"):
        upper(norm=1).sqrt2()
    with pytest.raises(ValueError, match="finite"):
        upper(1.7e308).sqrt2()


def test_part_is_checked():
    with pytest.raises(ValueError, match="finite"):
        Part("x", "y", (1, 1), math.nan, "verified", "")
    with pytest.raises(ValueError, match="guarantee must be"):
        Part("x", "y", (1, 1), 1.0, "sure", "")


def test_witness_is_checked():
    x, y = np.zeros(3), np.ones(3)
    kept = lower(witness=(x, y)).witness
    assert np.array_equal(kept[0], x) and kept[1].dtype == np.float64 and not kept[1].flags.writeable
    for bad, why in [
        ((x, x), "differ"),
        ((x, np.ones(2)), "one shape"),
        ((x, y * np.inf), "finite"),
        ((x,), "two points"),
    ]:
        with pytest.raises(ValueError, match=why):
            lower(witness=bad)


def test_method_notes_and_seconds_are_checked():
    with pytest.raises(ValueError, match="method"):
        upper(method="")
    with pytest.raises(ValueError, match="method"):
        Estimate(1.0, 2)
    with pytest.raises(ValueError, match="tuple of strings"):
        upper(notes="one")
    with pytest.raises(ValueError, match="seconds"):
        upper(seconds=-1.0)


def test_replace_copy_and_pickle_keep_everything():
    b = upper(pairwise=PAIRS, parts=(PART,), notes=("a",))
    for twin in (dataclasses.replace(b), copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        assert twin.value == b.value and twin.parts == b.parts and np.array_equal(twin.pairwise, PAIRS)


# ---------------------------------------------------------------------------------------- how they look
def test_text_says_what_is_known():
    b = upper(
        2.0000001,
        guarantee="probabilistic",
        failure_probability=1e-9,
        pairwise=PAIRS,
        parts=(PART,),
        notes=("hm",),
    )
    text = repr(b)
    assert "L <= 2.00001" in text and "probabilistic, fails with probability <= 1e-09" in text
    assert "worst (0, 2): 4" in text and "hm" in text and "4 x 3" in text and "Cholesky" in text
    assert "L ~ 3" in repr(estimate()) and "not a bound" in repr(estimate())
    assert "L >= 1.99999" in repr(lower(1.9999999)) and "attained" not in repr(lower())
    assert "attained" in repr(lower(witness=(np.zeros(2), np.ones(2))))


def test_long_part_lists_are_cut_in_the_repr_only():
    b = upper(parts=[dataclasses.replace(PART, source=f"tap{i}") for i in range(40)])
    assert "tap39" not in repr(b) and "and 28 more" in repr(b)
    assert "tap39" in b.parts_table() and "tap39" in b.to_markdown() and "tap39" in b._repr_html_()
    assert upper().parts_table() == "(no parts)"


def test_names_cannot_break_html_or_markdown():
    b = upper(method="<script>", parts=(dataclasses.replace(PART, source="a|b<i>"),), notes=("<b>",))
    assert (
        "<script>" not in b._repr_html_() and "<i>" not in b._repr_html_() and "&lt;b&gt;" in b._repr_html_()
    )
    assert "a\\|b\\<i>" in b.to_markdown()
    assert "&lt;" in html_table(("<",), [["<"]]) and "\\|" in markdown_table(("a",), [["|"]])


@pytest.mark.parametrize(
    "value", [1 / 3, 2.0000001, 123456.7, 9.9999999e9, 1e-310, 1e200, 99999.96, 0.5, 1e-5]
)
def test_numbers_are_printed_on_the_safe_side(value):
    assert Fraction(show(value, "up")) >= Fraction(value) >= Fraction(show(value, "down"))
    assert float(show(value)) == pytest.approx(value, rel=1e-5)


def test_numbers_printed():
    assert [show(v) for v in (0.0, 1.0, 1000.0, 0.25, None, math.inf)] == [
        "0",
        "1",
        "1000",
        "0.25",
        "",
        "inf",
    ]


def test_numbers_of_a_column_have_equal_digits():
    shown = [entry(v, "up", 5) for v in (27.6599, 31.1979, 2, 9.999999, 123456789, 1e-9, 0.0)]
    assert shown == ["27.660", "31.198", "2.0000", "10.000", "1.2346e+08", "1.0001e-09", "0"]
    assert [seconds_text(s) for s in (0.0012, 0.9999, 2, 61.23, 1234)] == [
        "1.20 ms",
        "1000 ms",
        "2.00 s",
        "61.2 s",
        "1230 s",
    ]


def test_text_table_is_aligned():
    lines = text_table(("name", "n"), [["a", "10"], ["long name", "7"]], right=(1,)).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[3].endswith(" 7")


@pytest.mark.parametrize("make", [upper, estimate])
def test_plots_draw_what_there_is(make):
    from matplotlib.figure import Figure

    assert np.array_equal(make(pairwise=PAIRS).plot().images[0].get_array(), PAIRS)
    assert [p.get_width() for p in make(parts=(PART,)).plot().patches] == [1.25]
    mine = Figure().subplots()
    assert make(2.0).plot(mine) is mine and mine.patches[0].get_width() == 2.0
    make(parts=(PART,)).plot().figure.canvas.draw()


def test_plot_of_a_lower_bound():
    assert lower(2.0).plot().patches[0].get_width() == 2.0
    assert np.array_equal(lower(pairwise=PAIRS).plot().images[0].get_array(), PAIRS)


def test_importing_does_not_import_matplotlib():
    import subprocess
    import sys

    code = f"import sys, {module.__name__}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ errors
ITEMS = [
    Unsupported("mul", "Block/attention", (4, 8), "both factors depend on x.", "use a linear layer"),
    Unsupported("argmax", "", (), "the index depends on x.", "drop it"),
]


def test_unsupported_lists_everything_at_once():
    error = UnsupportedError(iter(ITEMS))
    assert error.items == tuple(ITEMS) and isinstance(error, ValueError)
    text = str(error)
    assert text.startswith("2 operations")
    for item in ITEMS:
        assert all(s in text for s in (item.primitive, item.path, str(item.shape), item.reason, item.remedy))
    assert str(UnsupportedError(ITEMS[:1])).startswith("1 operation of")
    with pytest.raises(TypeError):
        UnsupportedError([])


def test_unsupported_survives_pickle():
    twin = pickle.loads(pickle.dumps(UnsupportedError(ITEMS)))
    assert twin.items == tuple(ITEMS) and str(twin) == str(UnsupportedError(ITEMS))


def test_kinds_of_errors():
    assert issubclass(CertificateError, ValueError) and not issubclass(GuaranteeError, ValueError)


def test_shares_in_percent_are_on_the_side_of_their_bound() -> None:
    assert (percent(2 / 3), percent(2 / 3, "down"), percent(2 / 3, "up")) == ("66.67", "66.66", "66.67")
    assert (percent(1 / 3, "down", 1), percent(1 / 3, "up", 1)) == ("33.3", "33.4")
    # exact shares stay what they are, though their floats are below or above
    for count in (
        7,
        360,
        1000,
        10_000,
    ):
        for k in range(count + 1):
            for places in (2, 1):
                if k * 10 ** (places + 2) % count == 0:
                    assert float(percent(k / count, "down", places)) == k * 100 / count
                    assert percent(k / count, "up", places) == percent(k / count, "down", places)
    assert (percent(0.0, "up"), percent(1.0, "down")) == ("0.00", "100.00")
