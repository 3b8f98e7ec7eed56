"""What `trilemma profile` found on one host: kernel times by format and shape, and what lies between the kernels.

These tables travel inside a device profile (`core/device.py`) and are all that a prediction needs, on any machine.
How they are measured stands in `measure/device/`, how they are used in `measure/device/step_time.py`.
All times are seconds of wall clock, the lower quartile of several tries that took turns with all others.
"""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from trilemma.core.record import Record

Quantity = Literal["tpot_s", "ttft_s"]


class ReadRate(Record):
    """Bytes read per second by so many threads from a set of this size again and again; `level`: 'L2', 'memory'."""

    threads: int
    level: str
    working_set_bytes: int
    bytes_per_s: float = Field(gt=0)


class MacRate(Record):
    """Most multiply-accumulates per second that the engine's kernels reach, by instruction set and input precision."""

    isa: str
    precision: Literal["f32", "bf16", "int8"]
    threads: int
    macs_per_s: float = Field(gt=0)


class ProductTime(Record):
    """Seconds of one matrix product (rows, cols) x (cols, tokens), its input prepared, in a walk over others alike.

    working_set_bytes: weights that were read between two uses of the same matrix.
    """

    format: str
    activation: str
    threads: int
    tokens: int
    rows: int
    cols: int
    working_set_bytes: int
    seconds: float = Field(gt=0)


class AttentionTime(Record):
    """Seconds that one more cached position costs one key-value head, on one thread.

    tokens 1: a decode step, for all `group` query heads that share the head. tokens above 1: prefill, for one query
    head of one token.
    """

    kv: str
    threads: int
    tokens: int
    group: int
    head_dim: int
    seconds: float = Field(gt=0)


class Overhead(Record):
    """What a step of so many tokens costs beside products and attention.

    step_s, and vocab_s for each entry of the vocabulary: once a step. For each half of a layer (attention or
    feed-forward): block_s, dim_s x width of the model, and hidden_s x hidden width or heads_s x (query + key + value
    widths).
    """

    threads: int
    tokens: int
    step_s: float = Field(ge=0)
    vocab_s: float = Field(ge=0)
    block_s: float = Field(ge=0)
    dim_s: float = Field(ge=0)
    hidden_s: float = Field(ge=0)
    heads_s: float = Field(ge=0)


class CheckCase(Record):
    """One model that is not in the tables: what was predicted and what was measured."""

    name: str
    quantity: Quantity
    predicted_s: float = Field(gt=0)
    measured_s: float = Field(gt=0)

    @property
    def error(self) -> float:
        """|predicted / measured - 1|."""
        return abs(self.predicted_s / self.measured_s - 1)


class HostTables(Record):
    """All of one host.

    chunk: prompt tokens that go through a layer together; noisy: why the machine was not quiet, or None;
    wake_s: handing a job to threads that have just worked; method: how figures were taken, in words.
    """

    measured: datetime.date
    cpu: str
    cores: int
    isa: str
    chunk: int = Field(ge=1)
    method: str
    noisy: str | None = None
    wake_s: float = Field(ge=0)
    read_rates: tuple[ReadRate, ...] = ()
    mac_rates: tuple[MacRate, ...] = ()
    products: tuple[ProductTime, ...] = Field(min_length=1)
    attention: tuple[AttentionTime, ...] = Field(min_length=1)
    overheads: tuple[Overhead, ...] = Field(min_length=1)
    checks: tuple[CheckCase, ...] = ()

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads that the tables hold, ascending."""
        return tuple(sorted({row.threads for row in self.overheads}))

    def errors(self, quantity: Quantity) -> list[float]:
        """Relative errors of the check cases, ascending; empty when none were run."""
        return sorted(case.error for case in self.checks if case.quantity == quantity)
