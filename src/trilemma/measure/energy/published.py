"""What others measured of processors that generate tokens, the fit of the estimate's constants on a part of it, and
how the rest lies to the intervals that follow.

Fitted is one number a class, the power of a busy core, so that on the mean over its machines the logarithm of
estimated over published energy is 0. The interval's factor is that of a 95% prediction interval for a machine not seen:
exp(t x s x sqrt(1 + 1/n)), with n machines of the class and one spread s pooled over all fitted classes, since two
machines of a class say nothing of a spread. It is a statement about other machines of the kind that people publish;
kernels that dequantize, or a hot phone, come in through the time, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import Field, model_validator
from scipy.optimize import brentq
from scipy.stats import t as student_t

from trilemma.core.device import Source
from trilemma.core.record import Record
from trilemma.measure.energy.energy_model import DeviceEnergy


class PublishedCase(Record):
    """One published pair of rate and power."""

    device_class: str = Field(alias="class")
    machine: str
    use: Literal["fit", "check"]
    model: str
    source: str
    cores: int = Field(ge=1)
    read_bytes: float = Field(gt=0)
    macs: float = Field(gt=0)
    tokens_per_s: float = Field(gt=0)
    watts: float = Field(gt=0)
    scope: Literal["wall"]
    claim: str = Field(min_length=1)

    @property
    def j_per_token(self) -> float:
        return self.watts / self.tokens_per_s

    def estimate(self, constants: DeviceEnergy) -> float:
        """J a token by the formula, from the published time of a token."""
        return constants.joules(
            seconds=1 / self.tokens_per_s, cores=self.cores, read_bytes=self.read_bytes, macs=self.macs,
            precision="int8",
        )  # fmt: skip


class SetAside(Record):
    """A published figure that is not used, and why."""

    model: str
    source: str
    why: str = Field(min_length=1)


class PublishedEnergy(Record):
    """The file `published_energy.yaml`."""

    version: int = Field(ge=1, le=1)
    sources: dict[str, Source]
    cases: tuple[PublishedCase, ...]
    set_aside: tuple[SetAside, ...]

    @model_validator(mode="after")
    def _is_sourced_and_split_by_machine(self) -> PublishedEnergy:
        for case in self.cases:
            if case.source not in self.sources:
                raise ValueError(f"{case.machine}: no source is called '{case.source}'")
        both = self.machines("fit") & self.machines("check")
        if both:
            raise ValueError(f"fitted on and checked with: {', '.join(sorted(both))}")
        return self

    def machines(self, use: str) -> set[str]:
        return {case.machine for case in self.cases if case.use == use}

    def of(self, device_class: str, use: str) -> list[PublishedCase]:
        return [case for case in self.cases if (case.device_class, case.use) == (device_class, use)]


class Fitted(Record):
    """core_w and factor of a class, with what they stand on."""

    core_w: float
    factor: float
    machines: int


def read_published() -> PublishedEnergy:
    """The shipped cases."""
    text = (files("trilemma") / "devices" / "published_energy.yaml").read_text(encoding="utf-8")
    return PublishedEnergy.model_validate(yaml.safe_load(text))


def fit(published: PublishedEnergy, constants: dict[str, DeviceEnergy]) -> dict[str, Fitted]:
    """core_w and factor of every class that has cases to fit on; all other constants stay as given."""
    core_w: dict[str, float] = {}
    residuals: dict[str, list[float]] = {}
    for name, given in constants.items():
        cases = published.of(name, "fit")
        if cases:
            core_w[name] = _fit_core_w(cases, given)
            residuals[name] = _by_machine(cases, given.model_copy(update={"core_w": core_w[name]}))
    free = sum(len(each) - 1 for each in residuals.values())
    spread = math.sqrt(sum(value**2 for each in residuals.values() for value in each) / free)
    return {
        name: Fitted(
            core_w=core_w[name], machines=len(each),
            factor=math.exp(float(student_t.ppf(0.975, free)) * spread * math.sqrt(1 + 1 / len(each))),
        )
        for name, each in residuals.items()
    }  # fmt: skip


def _fit_core_w(cases: Sequence[PublishedCase], given: DeviceEnergy) -> float:
    """Where the mean logarithmic deviation over machines is 0."""

    def mean(core_w: float) -> float:
        deviations = _by_machine(cases, given.model_copy(update={"core_w": core_w}))
        return sum(deviations) / len(deviations)

    return float(brentq(mean, 1e-3, 1e3))


def _by_machine(cases: Sequence[PublishedCase], constants: DeviceEnergy) -> list[float]:
    """log(estimated / published) of each machine, its cases averaged: one with many models counts no more."""
    found: dict[str, list[float]] = {}
    for case in cases:
        found.setdefault(case.machine, []).append(math.log(case.estimate(constants) / case.j_per_token))
    return [sum(each) / len(each) for each in found.values()]
