"""The arithmetic of strategies: latency, energy, battery and money of a model on a device, a server or far away.

A server is a set of slots (servers x batch): an M/M/c queue (Erlang C) at the peak rate, holding each
request for its prefill and its tokens; prefills take their share of the engine's time away from
decoding. The least number of servers that keeps the limits counts. Left out: autoscaling, batches
that differ from request to request, failures of servers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from trilemma.core.device import Device, load_device
from trilemma.core.errors import InputError
from trilemma.core.recipe import explain
from trilemma.formats.artifact import load_any
from trilemma.measure.device.device_model import Demand, forecast
from trilemma.model.model import Model
from trilemma.search.forecast import AS_IT_IS, demand_of, form_of
from trilemma.search.strategies.scenario import Candidate, DeviceShare, Network, Remote, Scenario, Serving, Workload

HOURS_PER_MONTH = 730.5
DAYS_PER_MONTH = 30.44
TOKEN_PERCENTILE = 0.95  # of waiting for a slot
MOST_SERVERS = 1024


@dataclass(frozen=True)
class Times:
    """First token, time between tokens, and energy of one request on the device; `spread`: upper end over value."""

    ttft_s: float
    tpot_s: float
    energy_j: float = 0.0
    ttft_spread: float = 1.0
    tpot_spread: float = 1.0

    def answer_s(self, output_tokens: int) -> float:
        return self.ttft_s + self.tpot_s * (output_tokens - 1)


@dataclass(frozen=True)
class OnDevice:
    """A candidate on one kind of device."""

    device: DeviceShare
    fits: bool
    needed_bytes: float
    usable_bytes: float
    bound: str
    times: Times
    battery_wh: float | None


@dataclass(frozen=True)
class Fleet:
    """Servers for a peak rate. `ttft_s` includes the wait for a slot that 95% of requests do not exceed."""

    servers: int
    batch: int
    ttft_s: float
    tpot_s: float
    utilisation: float


def on_device(candidate: Candidate, share: DeviceShare, workload: Workload) -> OnDevice:
    """The forecast of a candidate on one kind of device, at the workload's lengths."""
    device = changed_device(share)
    assert candidate.model is not None
    demand = _demand(candidate.model, candidate.scheme or AS_IT_IS, workload.prompt_tokens, workload.output_tokens)
    found = forecast(device, demand)
    tokens = demand.output_tokens
    energy = found.measurements["energy_j_per_output_token"].value or 0.0
    times = Times(
        ttft_s=(found.measurements["ttft_s"].value or 0.0) / share.speed,
        tpot_s=(found.measurements["tpot_s"].value or 0.0) / share.speed,
        energy_j=energy * tokens / share.speed,
        ttft_spread=device.prefill_factor.value, tpot_spread=device.decode_factor.value,
    )  # fmt: skip
    battery = None if device.battery_wh is None else device.battery_wh.value
    return OnDevice(share, found.fits, found.needed_bytes, found.usable_bytes, found.bound, times, battery)


def changed_device(share: DeviceShare) -> Device:
    """A profile with the keys that the scenario changes; raises InputError for a change that can not be."""
    if not share.changes:
        return _profile(share.profile)
    return _changed(share.profile, share.label, json.dumps(_with_floats(share.changes), sort_keys=True))


@cache
def _changed(profile: str, label: str, changes: str) -> Device:
    data = {**_profile(profile).model_dump(), **json.loads(changes), "name": label}
    try:
        return Device.model_validate(data)
    except ValidationError as error:
        raise InputError(f"Device '{label}': its changes can not be read: {explain(error)[:400]}") from None


def _with_floats(given: Any) -> Any:
    """YAML reads 6e9 as a word; here it is a number."""
    if isinstance(given, dict):
        return {key: _with_floats(value) for key, value in given.items()}
    if isinstance(given, str):
        try:
            return float(given)
        except ValueError:
            return given
    return given


@cache
def _profile(name: str) -> Device:
    return load_device(name)


@cache
def _model(path: str) -> Model:
    return load_any(path)


@cache
def _demand(path: str, scheme: str, prompt_tokens: int, output_tokens: int) -> Demand:
    return demand_of(_model(path), form_of(_model(path), scheme), prompt_tokens, output_tokens)


def forget_files() -> None:
    """Read profiles and models anew: what is remembered between two variations of a scenario may have changed since."""
    for remembered in (_changed, _profile, _model, _demand):
        remembered.cache_clear()


def network_s(network: Network, workload: Workload) -> float:
    """Time on the way of one request: a round trip and the prompt's bytes."""
    return network.round_trip_s + workload.prompt_tokens * network.bytes_per_token / network.bytes_per_s


def remote_times(remote: Remote, network: Network, workload: Workload) -> Times:
    """A provider's times with the network's on top; the device spends its radio's energy alone."""
    return Times(
        ttft_s=network_s(network, workload) + remote.ttft_s, tpot_s=remote.tpot_s, energy_j=network.radio_j_per_request
    )


def remote_price(remote: Remote, workload: Workload, requests: float) -> float:
    """Of so many requests."""
    prompt = workload.prompt_tokens * remote.price_input_per_million
    return requests * (prompt + workload.output_tokens * remote.price_output_per_million) / 1e6


def traffic_price(network: Network, workload: Workload, requests: float) -> float:
    """Money for the traffic of so many requests, in the currency of the scenario."""
    tokens = workload.prompt_tokens + workload.output_tokens
    return requests * tokens * network.bytes_per_token * network.price_per_gb / 1e9


def erlang_c(slots: int, load: float) -> float:
    """Probability that a request waits in M/M/c; `load` is arrival rate x holding time, less than `slots`.

    By the recursion of Erlang B, B(k) = a B(k-1) / (k + a B(k-1)), which does not overflow.
    """
    blocked = 1.0
    for k in range(1, slots + 1):
        blocked = load * blocked / (k + load * blocked)
    return blocked / (1 - load / slots * (1 - blocked))


def wait_s(slots: int, load: float, hold_s: float, percentile: float = TOKEN_PERCENTILE) -> float:
    """The wait that this share of requests does not exceed: P(W > t) = C exp(-(slots - load) t / hold)."""
    if slots > load + 10 * math.sqrt(load) + 20:
        return 0.0  # the chance to wait is below one in a million
    chance = erlang_c(slots, load)
    if chance <= 1 - percentile:
        return 0.0
    return math.log(chance / (1 - percentile)) * hold_s / (slots - load)


def fleet_of(
    serving: Serving, workload: Workload, rate: float, servers: int, batch: int, step_s: float
) -> Fleet | None:
    """What so many servers do at a rate, decoding in batches of this size; None where they do not keep up."""
    prefill_s = workload.prompt_tokens / serving.prefill_tokens_per_s
    prefilling = rate / servers * prefill_s  # share of a server's time
    if prefilling >= 1:
        return None
    tpot_s = step_s / (1 - prefilling)
    hold_s = prefill_s + tpot_s * (workload.output_tokens - 1)
    slots, load = servers * batch, rate * hold_s
    if load >= slots:
        return None
    # A prefill waits for the one before it: M/M/1 at that share of the engine's time.
    ttft_s = wait_s(slots, load, hold_s) + prefill_s / (1 - prefilling)
    return Fleet(servers, batch, ttft_s, tpot_s, load / slots)


def least_fleet(serving: Serving, workload: Workload, rate: float, network: Network) -> Fleet | None:
    """The fewest servers that keep the limits at this rate, and of their batches the quickest; None for none."""
    best: Fleet | None = None
    for step in serving.steps:
        found = _least_servers(serving, workload, rate, network, step.batch, step.step_s)
        if found is not None and (best is None or (found.servers, found.tpot_s) < (best.servers, best.tpot_s)):
            best = found
    return best


def _least_servers(
    serving: Serving, workload: Workload, rate: float, network: Network, batch: int, step_s: float
) -> Fleet | None:
    """More servers never wait longer, so the number is found by doubling and halving."""
    alone = Times(workload.prompt_tokens / serving.prefill_tokens_per_s + network_s(network, workload), step_s)
    if broken_times(alone, workload):
        return None

    def keeps(servers: int) -> Fleet | None:
        fleet = fleet_of(serving, workload, rate, servers, batch, step_s)
        if fleet is None:
            return None
        times = Times(fleet.ttft_s + network_s(network, workload), fleet.tpot_s)
        return fleet if not broken_times(times, workload) else None

    high = 1
    while keeps(high) is None:
        high *= 2
        if high > MOST_SERVERS:
            return None
    low = high // 2  # does not keep
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) is not None else (middle, high)
    return keeps(high)


def broken_times(times: Times, workload: Workload) -> list[tuple[str, float, float]]:
    """(limit, its value, what was found) of each limit on time that does not hold."""
    answer = times.answer_s(workload.output_tokens)
    limits = (
        ("ttft_limit_s", workload.ttft_limit_s, times.ttft_s),
        ("tpot_limit_s", workload.tpot_limit_s, times.tpot_s),
        ("answer_limit_s", workload.answer_limit_s, answer),
    )
    return [(name, limit, found) for name, limit, found in limits if limit is not None and found > limit]


def battery_share(energy_j: float, battery_wh: float, requests_per_day: float) -> float:
    """Share of a full battery that a day's requests take, idle power aside."""
    return energy_j * requests_per_day / (battery_wh * 3600)


def effort_price(scenario: Scenario, days: float, upkeep_days_per_month: float) -> float:
    """Work a month: what is done once, spread over the months, and what stays."""
    return scenario.prices.engineer_per_day * (days / scenario.months + upkeep_days_per_month)


def download_price(scenario: Scenario, size_bytes: float) -> float:
    """A month's share of every customer's download of the model."""
    return scenario.customers * size_bytes * scenario.network.price_per_gb / 1e9 / scenario.months
