"""A made-up /sys for each test."""

from __future__ import annotations

import pytest
from sysfs_tree import Tree


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)
