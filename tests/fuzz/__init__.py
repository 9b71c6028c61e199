"""A machine that goes on looking for breaks: random programs against every property that a bound must have.

`grammar` draws programs, `properties` checks one, `python -m tests.fuzz --minutes 30` runs them for as long as asked,
and `tests/test_fuzz.py` runs a fixed number of them.
"""
