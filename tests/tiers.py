"""The two tiers of a parametrization: its representatives by default, the whole grid with --all."""

import pytest


def some(cases, *kept):
    """The `cases` of a parametrization; all but the `kept` ones are slow."""
    cases = list(cases)
    assert all(case in cases for case in kept), kept
    slow = ((case if isinstance(case, tuple) else (case,)) for case in cases)
    return [case if case in kept else pytest.param(*values, marks=pytest.mark.slow) for case, values in zip(cases, slow)]
