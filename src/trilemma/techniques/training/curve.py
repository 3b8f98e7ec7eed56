"""The learning curve: a list of points that is also a file of JSON lines, for others to draw."""

from __future__ import annotations

from pathlib import Path

from trilemma.core.record import Record

CURVE_FILE = "learning_curve.jsonl"


class CurvePoint(Record):
    """One line of the learning curve. `train_loss` is the mean since the line before."""

    step: int
    seconds: float
    tokens: int
    train_loss: float | None
    validation_loss: float | None
    learning_rate: float


def append_point(folder: Path, point: CurvePoint) -> None:
    with (folder / CURVE_FILE).open("a", encoding="utf-8") as file:
        file.write(point.model_dump_json() + "\n")


def write_curve(folder: Path, curve: list[CurvePoint]) -> None:
    """Replace the file at once: a resumed run drops the points after its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{CURVE_FILE}"
    beside.write_text("".join(point.model_dump_json() + "\n" for point in curve), encoding="utf-8")
    beside.replace(folder / CURVE_FILE)


def read_curve(folder: Path) -> list[CurvePoint]:
    """The learning curve kept in `folder`; a last line cut off by a kill is left out."""
    path = folder / CURVE_FILE
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [CurvePoint.model_validate_json(line) for line in whole.splitlines()]
