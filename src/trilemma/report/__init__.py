"""Evidence as one self-contained page. Needs only records, so an old run renders anywhere."""

from __future__ import annotations

from trilemma.report.cost import render_cost
from trilemma.report.page import render

__all__ = ["render", "render_cost"]
