"""The scenario file of `trilemma advise`: who asks, on which devices, over which network, for what money, with whom.

Every number is the user's: measured, read somewhere or assumed, and `basis` says which. Qualities are
never made up here: each candidate brings its own, in one unit, with its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from trilemma.core.errors import InputError
from trilemma.core.recipe import explain
from trilemma.core.record import Record

SCENARIO_VERSION = 1
Place = Literal["device", "server", "remote"]
Reach = Literal["device", "own servers", "anywhere"]
Preference = Literal["cost", "quality", "speed", "battery", "effort"]


def _positive(help_: str, default: Any = ...) -> Any:
    return Field(default, gt=0, allow_inf_nan=False, description=help_)


def _count(help_: str, default: Any = ...) -> Any:
    return Field(default, ge=0, allow_inf_nan=False, description=help_)


def _share(help_: str, default: Any = ...) -> Any:
    return Field(default, ge=0, le=1, allow_inf_nan=False, description=help_)


class Workload(Record):
    """Requests and what each must keep."""

    requests_per_day: float = _positive("requests of all customers together")
    peak_requests_per_s: float = _positive("of all customers in the busiest minutes; servers are counted for it")
    prompt_tokens: int = Field(ge=1, description="of a usual request, instructions included")
    output_tokens: int = Field(ge=2, description="of a usual answer")
    ttft_limit_s: float | None = _positive("longest wait for the first token", None)
    tpot_limit_s: float | None = _positive("longest time between tokens", None)
    answer_limit_s: float | None = _positive("longest time to the end of the answer", None)
    least_quality: float | None = _count("in the unit of `quality_means`", None)
    offline: bool = Field(False, description="must answer without a network")
    least_available: float = _share("share of requests that must be answered", 0.0)


class DeviceShare(Record):
    """One kind of device that customers have."""

    profile: str = Field(description="phone, raspberry-pi-5, laptop, or the path of a profile")
    name: str | None = Field(None, description="what to call it; the profile's name by default")
    share: float = _share("of the customers", 1.0)
    changes: dict[str, Any] = Field({}, description="keys of the profile that differ on this device")
    speed: float = _positive("what predicted speeds are multiplied by, once it was measured there", 1.0)

    @property
    def label(self) -> str:
        return self.name or self.profile


class Battery(Record):
    """What answering may take from a battery."""

    requests_per_device_per_day: float = _positive("of one customer")
    most_share_per_day: float = _share("of a full battery")


class Network(Record):
    """Between the devices and any server."""

    available: float = _share("share of requests that find a connection", 1.0)
    round_trip_s: float = _count("there and back, connection included", 0.0)
    bytes_per_s: float = _positive("of the slower direction", 1e6)
    bytes_per_token: float = _positive("of text with its envelope", 8.0)
    price_per_gb: float = _count("of traffic and of downloading a model, whoever pays", 0.0)
    radio_j_per_request: float = _count("energy that a device spends on sending and receiving", 0.0)


class Prices(Record):
    """Money."""

    currency: str = Field(default="EUR", description="of every price here")
    server_per_hour: float = _count("of one server of `serving`", 0.0)
    engineer_per_day: float = _count("of work", 0.0)
    most_per_month: float | None = _count("budget", None)


class Team(Record):
    """What is at hand."""

    runtimes: tuple[str, ...] = Field(default=(), description="runtimes that are integrated already")
    new_runtime_days: float = _count("work to integrate one that is not", 0.0)


class BatchStep(Record):
    """One row of `trilemma bench --batch`."""

    batch: int = Field(ge=1, description="sequences decoded together")
    step_s: float = _positive("time of one token for each of them")


class Serving(Record):
    """What one server does, measured with `trilemma bench --batch`."""

    prefill_tokens_per_s: float = _positive("prompt tokens read per second")
    steps: tuple[BatchStep, ...] = Field(min_length=1, description="step time by batch")


class Remote(Record):
    """What a provider promises and asks."""

    ttft_s: float = _positive("to the first token, network aside")
    tpot_s: float = _positive("between tokens")
    price_input_per_million: float = _count("prompt tokens")
    price_output_per_million: float = _count("output tokens")


class Candidate(Record):
    """One model in one place. On a device its bytes and MACs are counted from `model` and `scheme`."""

    name: str = Field(min_length=1, description="of the strategy")
    place: Place = Field(description="device, server (ours) or remote (someone else's)")
    quality: float | None = _count("your own measurement, in the unit of `quality_means`", None)
    quality_source: str = Field("", description="how that was measured, or that it is assumed")
    model: str | None = Field(None, description="on a device: checkpoint, artifact or bare config.json")
    scheme: str | None = Field(None, description="on a device: scheme it is compressed with; as it is by default")
    runtime: str | None = Field(None, description="what runs it; integrating one that is not at hand takes days")
    setup_days: float = _count("work until it is in production, runtime aside", 0.0)
    upkeep_days_per_month: float = _count("work that stays", 0.0)
    serving: Serving | None = Field(None, description="on a server")
    remote: Remote | None = Field(None, description="remote")

    @model_validator(mode="after")
    def _has_what_its_place_needs(self) -> Candidate:
        need = {"device": "model", "server": "serving", "remote": "remote"}[self.place]
        if getattr(self, need) is None:
            raise ValueError(f"candidate '{self.name}' on '{self.place}' needs '{need}'")
        return self


class Cascade(Record):
    """A small candidate answers first; what it is not sure of goes on to a large one (`trilemma run --cascade`)."""

    name: str = Field(min_length=1, description="of the strategy")
    small: str = Field(description="name of a candidate")
    large: str = Field(description="name of a candidate")
    kept_share: float = _share("of requests that the small one answers, at the calibrated threshold")
    quality: float | None = _count("of both together, measured", None)
    quality_source: str = Field("", description="how that was measured, or that it is assumed")
    setup_days: float = _count("work beyond that of both", 0.0)


class Scenario(Record):
    """The whole file."""

    version: Literal[1] = Field(1, description="of the form of this file")
    name: str = Field(min_length=1, description="a title")
    question: str = Field("", description="what is to be decided")
    quality_means: str = Field("quality", description="what the quality numbers are: the task, the unit")
    workload: Workload = Field(description="requests and their limits")
    devices: tuple[DeviceShare, ...] = Field((), description="what customers have; the worst one served decides")
    least_share_served: float = _share("share of customers whose device must manage", 1.0)
    customers: float = _count("devices that download a model", 0.0)
    battery: Battery | None = Field(None, description="left out: the devices hang on the mains")
    network: Network = Field(default=Network(), description="between devices and servers")
    data_may_go: Reach = Field("anywhere", description="device: nowhere; own servers; anywhere")
    prices: Prices = Field(default=Prices(), description="money")
    team: Team = Field(default=Team(), description="runtimes and skills at hand")
    months: float = _positive("over which one-off work is spread", 12.0)
    prefer: Preference = Field("cost", description="what decides among feasible strategies")
    equal_within: float = _share("relative difference that counts as none; the next criterion decides then", 0.05)
    candidates: tuple[Candidate, ...] = Field(min_length=1, description="models to choose from")
    cascades: tuple[Cascade, ...] = Field((), description="pairs of them")
    basis: dict[str, str] = Field({}, description="key -> where its numbers are from: a source, or 'assumption: ...'")

    @model_validator(mode="after")
    def _fits_together(self) -> Scenario:
        names = [*(item.name for item in self.candidates), *(item.name for item in self.cascades)]
        double = {name for name in names if names.count(name) > 1}
        if double:
            raise ValueError(f"the name '{min(double)}' is used twice")
        places = {candidate.name: candidate.place for candidate in self.candidates}
        for pair in self.cascades:
            for role in (pair.small, pair.large):
                if role not in places:
                    raise ValueError(f"cascade '{pair.name}': no candidate is called '{role}'")
            if places[pair.large] == "device":
                raise ValueError(
                    f"cascade '{pair.name}': '{pair.large}' runs on the device; it must be reached over a network"
                )
        on_device = any(place == "device" for place in places.values())
        if on_device and not self.devices:
            raise ValueError("a candidate runs on devices, and 'devices' names none")
        total = sum(device.share for device in self.devices)
        if self.devices and total > 1 + 1e-9:
            raise ValueError(f"the shares of the devices add up to {total:g}, more than 1")
        return self


def read_scenario(path: str | Path) -> Scenario:
    """Read a scenario file (YAML); paths in it count from its folder.

    Raises:
        InputError: not readable, not YAML, an unknown key, or a value that can not be.
    """
    place = Path(path)
    try:
        data = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"Can not read the scenario '{place}': {why}. examples/scenarios shows the form.") from None
    if not isinstance(data, dict):
        raise InputError(f"The scenario '{place}' must be a mapping with 'name', 'workload', 'candidates', ...")
    if data.get("version", SCENARIO_VERSION) != SCENARIO_VERSION:
        raise InputError(
            f"The scenario '{place}' has version {data['version']!r}; this release reads {SCENARIO_VERSION}."
        )
    try:
        scenario = Scenario.model_validate(data)
    except ValidationError as error:
        raise InputError(f"The scenario '{place}' can not be read: {explain(error)[:600]}") from None
    return _from_folder(scenario, place.parent)


def _from_folder(scenario: Scenario, folder: Path) -> Scenario:
    candidates = tuple(
        item if item.model is None else item.model_copy(update={"model": _found(item.model, folder)})
        for item in scenario.candidates
    )
    devices = tuple(item.model_copy(update={"profile": _found(item.profile, folder)}) for item in scenario.devices)
    return scenario.model_copy(update={"candidates": candidates, "devices": devices})


def _found(given: str, folder: Path) -> str:
    return str(folder / given) if (folder / given).exists() else given


def numbers(data: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a dumped scenario: ('workload.prompt_tokens', 300.0), ('candidates.0.quality', 0.7), ..."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from numbers(value, f"{prefix}.{index}")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield prefix, float(data)
