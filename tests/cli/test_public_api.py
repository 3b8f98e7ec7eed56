"""`import trilemma` is light, its names are sorted, documented and all there."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import trilemma


def test_the_names_are_sorted_and_complete():
    assert list(trilemma.__all__) == sorted(trilemma.__all__)
    assert dir(trilemma) == trilemma.__all__
    assert set(trilemma.__all__) == set(trilemma._WHERE)


@pytest.mark.parametrize("name", trilemma.__all__)
def test_every_name_resolves_and_is_documented(name):
    thing = getattr(trilemma, name)
    assert callable(thing)
    assert inspect.getdoc(thing)


def test_an_unknown_name_is_answered_with_the_valid_ones():
    with pytest.raises(AttributeError, match="optimize"):
        trilemma.optimise  # noqa: B018


def test_importing_loads_nothing_heavy():
    probe = "import sys, trilemma; print(sorted({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
