"""The one base of our plain records: frozen, compared by value, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen record that validates once, at the door, and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
