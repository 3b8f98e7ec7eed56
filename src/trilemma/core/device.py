"""A device that need not be here: what its memory, arithmetic, power and battery can do, each number with its source.

The shipped profiles lie as package data in `trilemma/devices`; a user's own file has the same form, and so has what
`trilemma profile` writes, with tables of kernel times in it (`core/host_tables.py`). What a model costs there is
predicted in `measure/device/`, from these records and nothing else.
"""

from __future__ import annotations

import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from trilemma.core.errors import InputError, UnknownNameError
from trilemma.core.host_tables import HostTables
from trilemma.core.recipe import explain
from trilemma.core.record import Record

DEVICE_VERSION = 2
DEVICES = ("phone", "raspberry-pi-5", "laptop")

Arithmetic = Literal["f32", "bf16", "int8"]
Basis = Literal["published", "derived", "assumed", "measured"]


class Source(Record):
    """A page that numbers were read from, and when."""

    title: str = Field(min_length=1)
    url: str = Field(min_length=1)
    read: datetime.date


class Figure(Record):
    """One number with where it is from.

    basis: 'published' stands so in the source; 'derived' follows from what stands there by the arithmetic in
    `claim`; 'assumed' is a judgement, with its reason in `claim`; 'measured' was taken on the device itself, as `claim`
    says.
    """

    value: float = Field(gt=0, allow_inf_nan=False)
    basis: Basis
    source: str | None = None
    claim: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _a_bare_number_is_an_assumption(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"value": given, "basis": "assumed", "claim": "given without a source"}
        return given

    @model_validator(mode="after")
    def _says_where_from(self) -> Figure:
        if self.basis in ("published", "derived") and not self.source:
            raise ValueError(f"a {self.basis} number names its source")
        return self


class Device(Record):
    """What a device can do.

    memory_bytes, usable_bytes: all of it, and what one process may fill; bandwidth_bytes_per_s: peak of the
    memory; bandwidth_share: of the peak that decoding reaches; macs_per_s: sustained multiply-accumulates of
    matrix products by precision, all cores; overhead_s: per decode step beyond bytes and arithmetic.

    idle_w, active_w: whole device waiting, and with its cores at work (memory's and arithmetic's own share comes
    on top: byte_pj, mac_pj); battery_wh: None where it hangs on the mains; storage_bytes_per_s: reading the model.

    decode_factor, prefill_factor, energy_factor: predictions are given as [value / factor, value x factor]. They
    cover every published case that was found (`devices/published.yaml`); the smallest of them reads
    checked_bytes a token, and what reads less than half of that has its factors doubled.

    host: tables that `trilemma profile` measured there; with them times are predicted step by step instead
    (`measure/device/step_time.py`).
    """

    version: Literal[2] = 2
    name: str
    title: str
    kind: Literal["phone", "board", "laptop", "server"]
    runtime: str
    memory_bytes: Figure
    usable_bytes: Figure
    bandwidth_bytes_per_s: Figure
    bandwidth_share: Figure
    macs_per_s: dict[Arithmetic, Figure]
    overhead_s: Figure
    idle_w: Figure
    active_w: Figure
    byte_pj: Figure
    mac_pj: dict[Arithmetic, Figure]
    battery_wh: Figure | None = None
    storage_bytes_per_s: Figure
    decode_factor: Figure
    prefill_factor: Figure
    energy_factor: Figure
    checked_bytes: Figure
    host: HostTables | None = None
    sources: dict[str, Source] = {}

    @field_validator("macs_per_s", "mac_pj")
    @classmethod
    def _every_precision(cls, given: dict[Arithmetic, Figure]) -> dict[Arithmetic, Figure]:
        missing = {"f32", "bf16", "int8"} - set(given)
        if missing:
            raise ValueError(f"a number for {', '.join(sorted(missing))} is missing")
        return given

    @field_validator("bandwidth_share")
    @classmethod
    def _a_share(cls, given: Figure) -> Figure:
        if given.value > 1:
            raise ValueError("a share lies between 0 and 1")
        return given

    @field_validator("decode_factor", "prefill_factor", "energy_factor")
    @classmethod
    def _a_factor(cls, given: Figure) -> Figure:
        if given.value < 1:
            raise ValueError("an uncertainty factor is 1 or more")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Device:
        for name, figure in self.figures().items():
            if figure.source is not None and figure.source not in self.sources:
                raise ValueError(f"{name}: no source is called '{figure.source}'; there are {', '.join(self.sources)}")
        if self.usable_bytes.value > self.memory_bytes.value:
            raise ValueError("usable_bytes is more than memory_bytes")
        if self.active_w.value < self.idle_w.value:
            raise ValueError("active_w is less than idle_w")
        return self

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bytes that decoding reads per second."""
        return self.bandwidth_bytes_per_s.value * self.bandwidth_share.value

    def widening(self, read_bytes: float) -> float:
        """What the factors are multiplied by for a model that reads so many bytes a token."""
        return 2.0 if read_bytes < self.checked_bytes.value / 2 else 1.0

    def figures(self) -> dict[str, Figure]:
        """Every number of the profile by its key: 'idle_w', 'macs_per_s.int8', ..."""
        found: dict[str, Figure] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Figure):
                found[name] = value
            elif name in ("macs_per_s", "mac_pj"):
                found |= {f"{name}.{precision}": figure for precision, figure in value.items()}
        return found


def load_device(name: str | Path) -> Device:
    """A shipped profile by its name, or a user's own by its path.

    Raises:
        UnknownNameError: neither a shipped name nor a file.
        InputError: a file that can not be read, or whose form is wrong; the message names the key.
    """
    if str(name) in DEVICES:
        text = (files("trilemma") / "devices" / f"{name}.yaml").read_text(encoding="utf-8")
        return read_device(text, f"the shipped profile '{name}'")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json") and not path.is_file():
        raise UnknownNameError("device (a name, or the path of a .yaml file)", str(name), DEVICES)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Can not read the device profile '{path}': {getattr(error, 'strerror', None) or error}. "
            f"Give the path of a .yaml file, or one of: {', '.join(DEVICES)}."
        ) from None
    return read_device(text, f"'{path}'")


def write_device(device: Device) -> str:
    """The profile as YAML that `read_device` takes, one line a figure or row of a table."""
    data = device.model_dump(mode="json", exclude_none=True)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=1 << 16, allow_unicode=True)
    return str(text)


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """A profile of an older version as one of this: version 1 had no tables, and everything else alike."""
    return {**data, "version": DEVICE_VERSION}


def read_device(text: str, where: str = "the device profile") -> Device:
    """Parse a profile (YAML, of which JSON is a part).

    Raises:
        InputError: names the key, the value and what was expected.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"Can not read {where}: it is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"Can not read {where}: a mapping with 'name', 'memory_bytes', ... was expected.")
    version = data.get("version", DEVICE_VERSION)
    if version not in range(1, DEVICE_VERSION + 1):
        raise InputError(f"Can not read {where}: version {version!r}; this release reads 1 to {DEVICE_VERSION}.")
    try:
        return Device.model_validate(migrate(data))
    except ValidationError as error:
        raise InputError(
            f"Can not read {where}: {explain(error)[:600]}. The profiles in trilemma/devices show the form."
        ) from None
