"""Texts to token windows: documents, three disjoint parts, windows for measuring and calibrating."""

from trilemma.data.calibration import sample_calibration
from trilemma.data.documents import Document, read_documents
from trilemma.data.split import Parts, describe_part, require_disjoint, split_documents
from trilemma.data.windows import TokenSet, make_windows

__all__ = [
    "Document",
    "Parts",
    "TokenSet",
    "describe_part",
    "make_windows",
    "read_documents",
    "require_disjoint",
    "sample_calibration",
    "split_documents",
]
