"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from trilemma.core.errors import OutputError


def write_whole(path: str | Path, text: str) -> Path:
    """Write UTF-8 text beside its place and rename it, so that no half of it is ever there; what was there goes.

    Raises:
        OutputError: the place can not be written to.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"Can not write '{target}': {error.strerror}. Give another path.") from None
    finally:
        partial.unlink(missing_ok=True)
    return target
