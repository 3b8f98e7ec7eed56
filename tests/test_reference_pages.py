"""docs/reference says what the program says: it is generated, and a change of help or API must be written anew."""

from __future__ import annotations

import subprocess
import sys


def test_the_reference_is_current(repository):
    script = repository / "docs" / "make_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
