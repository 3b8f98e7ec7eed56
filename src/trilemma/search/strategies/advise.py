"""Which strategy: each candidate weighed against hard constraints, the feasible ones ranked, with reasons.

    scenario -> strategies -> figures and broken constraints -> ranking -> what would change it

Costs and times are arithmetic (`costs.py`); qualities are the scenario's own. The order is
`rank.py`; what would change the winner is found by trying (`sensitivity.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trilemma.core.advice import Advice, Failure, Strategy, Swap
from trilemma.core.quantity import format_percent, format_quantity, significant
from trilemma.search.strategies import costs
from trilemma.search.strategies.costs import Fleet, OnDevice, Times
from trilemma.search.strategies.rank import explain_ranking, rank
from trilemma.search.strategies.scenario import Candidate, Cascade, Scenario, read_scenario


def advise(scenario: Scenario | str | Path, *, sensitivity: bool = True) -> Advice:
    """Rank the strategies of a scenario and find what would change the winner.

    Raises:
        InputError: a scenario, device or model that can not be used.
    """
    from trilemma.search.strategies.sensitivity import find_swaps

    costs.forget_files()
    given = scenario if isinstance(scenario, Scenario) else read_scenario(scenario)
    strategies = assess_all(given)
    order = rank(strategies, given)
    swaps: tuple[Swap, ...] = ()
    steady: tuple[str, ...] = ()
    if sensitivity:
        swaps, steady = find_swaps(given, order[0].name if order else None)
    return Advice(
        scenario=given.name, question=given.question, quality_means=given.quality_means,
        currency=given.prices.currency, strategies=tuple(strategies), ranking=tuple(item.name for item in order),
        reasons=explain_ranking(order, given), swaps=swaps, steady=steady, assumptions=given.basis,
    )  # fmt: skip


def winner(scenario: Scenario) -> str | None:
    """The name of the best feasible strategy."""
    order = rank(assess_all(scenario), scenario)
    return order[0].name if order else None


def assess_all(scenario: Scenario) -> list[Strategy]:
    """Every candidate and cascade with its figures and the constraints that it breaks."""
    weigh: dict[str, Callable[[Scenario, Candidate], Strategy]] = {
        "device": _device_strategy, "server": _server_strategy, "remote": _remote_strategy,
    }  # fmt: skip
    found = [weigh[candidate.place](scenario, candidate) for candidate in scenario.candidates]
    return found + [_cascade_strategy(scenario, pair) for pair in scenario.cascades]


def _device_strategy(scenario: Scenario, candidate: Candidate) -> Strategy:
    places = [costs.on_device(candidate, device, scenario.workload) for device in scenario.devices]
    broken = [(place, _device_failures(scenario, place)) for place in places]
    failures, dropped = _unserved(scenario, broken)
    served = places if failures else [place for place in places if place.device.label not in dropped]
    worst = max(served, key=lambda place: place.times.answer_s(scenario.workload.output_tokens))
    download = costs.download_price(scenario, worst.needed_bytes)
    notes = [f"leaves out {', '.join(dropped)}"] if dropped and not failures else []
    days = _days(scenario, candidate)
    money = {"work": costs.effort_price(scenario, days, candidate.upkeep_days_per_month), "downloads": download}
    return _strategy(
        scenario, candidate, worst.times, money, days, failures=failures, decided_by=worst.device.label,
        battery=_worst_battery(scenario, served), available=1.0, notes=notes,
    )  # fmt: skip


def _device_failures(scenario: Scenario, place: OnDevice) -> list[Failure]:
    """What one kind of device can not do: hold it, answer in time, or last."""
    label, found = place.device.label, []
    if not place.fits:
        needed, usable = format_quantity(place.needed_bytes, "bytes"), format_quantity(place.usable_bytes, "bytes")
        found.append(Failure(constraint="memory", text=f"needs {needed} on {label}, which has {usable} to give"))
    for name, limit, value in costs.broken_times(place.times, scenario.workload):
        found.append(Failure(
            constraint=name, text=f"{_seconds(value)} on {label}{_bound(name, place)}; the limit is {_seconds(limit)}"
        ))  # fmt: skip
    share = _battery_of(scenario, place)
    if scenario.battery is not None and share is not None and share > scenario.battery.most_share_per_day:
        most = format_percent(scenario.battery.most_share_per_day)
        found.append(Failure(
            constraint="battery", text=f"takes {format_percent(share)} of a battery a day on {label}; at most {most}"
        ))  # fmt: skip
    return found


def _bound(limit: str, place: OnDevice) -> str:
    return f", where decoding waits for {place.bound}" if limit == "tpot_limit_s" else ""


def _unserved(scenario: Scenario, broken: list[tuple[OnDevice, list[Failure]]]) -> tuple[list[Failure], list[str]]:
    """Failures, when those devices that can not manage are more customers than may be left out; and their names."""
    failing = [(place, found) for place, found in broken if found]
    left_out = sum(place.device.share for place, _ in failing)
    names = [place.device.label for place, _ in failing]
    if left_out <= 1 - scenario.least_share_served + 1e-9 and len(failing) < len(broken):
        return [], names
    return [failure for _, found in failing for failure in found], names


def _battery_of(scenario: Scenario, place: OnDevice) -> float | None:
    if scenario.battery is None or place.battery_wh is None:
        return None
    return costs.battery_share(place.times.energy_j, place.battery_wh, scenario.battery.requests_per_device_per_day)


def _worst_battery(scenario: Scenario, places: list[OnDevice]) -> float | None:
    shares = [share for place in places if (share := _battery_of(scenario, place)) is not None]
    return max(shares, default=None)


def _radio_battery(scenario: Scenario) -> float | None:
    """What sending and receiving takes from the smallest battery."""
    sizes = [device.battery_wh.value for share in scenario.devices
             if (device := costs.changed_device(share)).battery_wh is not None]  # fmt: skip
    if scenario.battery is None or not sizes:
        return None
    per_day = scenario.battery.requests_per_device_per_day
    return costs.battery_share(scenario.network.radio_j_per_request, min(sizes), per_day)


def _server_strategy(scenario: Scenario, candidate: Candidate) -> Strategy:
    assert candidate.serving is not None
    workload = scenario.workload
    fleet = costs.least_fleet(candidate.serving, workload, workload.peak_requests_per_s, scenario.network)
    days = _days(scenario, candidate)
    money = {"work": costs.effort_price(scenario, days, candidate.upkeep_days_per_month)}
    money["traffic"] = _monthly_traffic(scenario, 1.0)
    if fleet is None:
        limits = "the limits on time can not be kept by any number of servers"
        return _strategy(
            scenario, candidate, None, money, days, failures=[Failure(constraint="throughput", text=limits)],
            battery=_radio_battery(scenario), available=scenario.network.available,
        )  # fmt: skip
    money["servers"] = fleet.servers * scenario.prices.server_per_hour * costs.HOURS_PER_MONTH
    times = Times(
        fleet.ttft_s + costs.network_s(scenario.network, workload), fleet.tpot_s, scenario.network.radio_j_per_request
    )
    return _strategy(
        scenario, candidate, times, money, days, battery=_radio_battery(scenario),
        available=scenario.network.available, notes=[_fleet_note(fleet)],
    )  # fmt: skip


def _fleet_note(fleet: Fleet) -> str:
    plural = "s" if fleet.servers != 1 else ""
    busy = format_percent(fleet.utilisation)
    return f"{fleet.servers} server{plural} in batches of {fleet.batch}, {busy} busy at the peak"


def _remote_strategy(scenario: Scenario, candidate: Candidate) -> Strategy:
    assert candidate.remote is not None
    times = costs.remote_times(candidate.remote, scenario.network, scenario.workload)
    requests = scenario.workload.requests_per_day * costs.DAYS_PER_MONTH
    days = _days(scenario, candidate)
    money = {
        "work": costs.effort_price(scenario, days, candidate.upkeep_days_per_month),
        "tokens": costs.remote_price(candidate.remote, scenario.workload, requests),
        "traffic": _monthly_traffic(scenario, 1.0),
    }
    return _strategy(
        scenario, candidate, times, money, days, battery=_radio_battery(scenario), available=scenario.network.available
    )


def _cascade_strategy(scenario: Scenario, pair: Cascade) -> Strategy:
    """The small one's costs, and the large one's for what it hands on. Times are those of a request handed on."""
    by_name = {candidate.name: candidate for candidate in scenario.candidates}
    small, large = by_name[pair.small], by_name[pair.large]
    on = 1 - pair.kept_share
    handed = scenario.model_copy(update={"workload": scenario.workload.model_copy(update={
        "peak_requests_per_s": max(scenario.workload.peak_requests_per_s * on, 1e-9),
        "requests_per_day": max(scenario.workload.requests_per_day * on, 1e-9),
        "ttft_limit_s": None, "answer_limit_s": None,
    })})  # fmt: skip
    lower = {"least_quality": None}
    loose = scenario.model_copy(update={"workload": scenario.workload.model_copy(update=lower)})
    first = assess_one(loose, small)
    second = assess_one(handed.model_copy(update={"workload": handed.workload.model_copy(update=lower)}), large)
    keep = ("memory", "battery", "ttft_limit_s", "tpot_limit_s", "answer_limit_s", "throughput")
    failures = [item for item in (*first.failures, *second.failures) if item.constraint in keep]
    times = _slow_path(scenario, first, second)
    days = first.setup_days + second.setup_days + pair.setup_days
    money = dict(first.cost_per_month)
    for name, value in second.cost_per_month.items():
        money[name] = money.get(name, 0.0) + value
    money["work"] = money.get("work", 0.0) + costs.effort_price(scenario, pair.setup_days, 0.0)
    radio = _radio_battery(scenario)
    battery = first.battery_share_per_day
    if battery is not None and radio is not None:
        battery += on * radio
    stand_in = Candidate.model_construct(
        name=pair.name, place=large.place, quality=pair.quality, quality_source=pair.quality_source
    )
    unique = tuple(dict.fromkeys(failures))
    made = _strategy(
        scenario, stand_in, times, money, days, failures=list(unique), battery=battery,
        available=pair.kept_share + on * scenario.network.available, decided_by=first.decided_by,
        notes=[f"{format_percent(pair.kept_share)} stay with {pair.small}; times are those of the rest", *second.notes],
    )  # fmt: skip
    return made.model_copy(update={"kind": "cascade"})


def assess_one(scenario: Scenario, candidate: Candidate) -> Strategy:
    """One candidate in a scenario (perhaps a variation of its own)."""
    alone = scenario.model_copy(update={"candidates": (candidate,), "cascades": ()})
    return assess_all(alone)[0]


def _slow_path(scenario: Scenario, first: Strategy, second: Strategy) -> Times | None:
    """A request that is handed on waits for the whole small answer: only then is its confidence known."""
    if first.answer_s is None or second.ttft_s is None or second.tpot_s is None:
        return None
    return Times(
        ttft_s=first.answer_s + second.ttft_s, tpot_s=max(first.tpot_s or 0.0, second.tpot_s),
        energy_j=(first.energy_j_per_request or 0.0) + (second.energy_j_per_request or 0.0),
    )  # fmt: skip


def _days(scenario: Scenario, candidate: Candidate) -> float:
    new = candidate.runtime is not None and candidate.runtime not in scenario.team.runtimes
    return candidate.setup_days + (scenario.team.new_runtime_days if new else 0.0)


def _monthly_traffic(scenario: Scenario, share: float) -> float:
    requests = scenario.workload.requests_per_day * costs.DAYS_PER_MONTH * share
    return costs.traffic_price(scenario.network, scenario.workload, requests)


def _strategy(
    scenario: Scenario,
    candidate: Candidate,
    times: Times | None,
    money: dict[str, float],
    days: float,
    *,
    failures: list[Failure] | None = None,
    battery: float | None = None,
    available: float = 1.0,
    decided_by: str = "",
    notes: list[str] | None = None,
) -> Strategy:
    """Put together, with the constraints that every kind of strategy must keep."""
    workload, found = scenario.workload, list(failures or [])
    on_device = candidate.place == "device"
    known = {failure.constraint for failure in found}
    if times is not None and not on_device:
        for name, limit, value in costs.broken_times(times, workload):
            if name not in known:
                found.append(Failure(constraint=name, text=f"{_seconds(value)}; the limit is {_seconds(limit)}"))
    found += _common_failures(scenario, candidate, available, money)
    tokens = workload.output_tokens
    return Strategy(
        name=candidate.name, kind=candidate.place,
        ttft_s=None if times is None else times.ttft_s, tpot_s=None if times is None else times.tpot_s,
        answer_s=None if times is None else times.answer_s(tokens),
        energy_j_per_request=None if times is None else times.energy_j, battery_share_per_day=battery,
        cost_per_month={name: value for name, value in money.items() if value}, setup_days=days,
        quality=candidate.quality, quality_source=candidate.quality_source, available=available,
        decided_by=decided_by, failures=tuple(found), close=_close(scenario, times) if not found else (),
        notes=tuple(notes or ()),
    )  # fmt: skip


def _common_failures(
    scenario: Scenario, candidate: Candidate, available: float, money: dict[str, float]
) -> list[Failure]:
    workload, found = scenario.workload, []
    reach = {"device": 0, "server": 1, "remote": 2}[candidate.place]
    if reach > {"device": 0, "own servers": 1, "anywhere": 2}[scenario.data_may_go]:
        found.append(
            Failure(
                constraint="data", text=f"sends what users say to a {candidate.place}; allowed: {scenario.data_may_go}"
            )
        )
    if workload.offline and reach:
        found.append(Failure(constraint="offline", text="needs a network; it must work without"))
    if available < workload.least_available:
        least = format_percent(workload.least_available)
        text = f"{format_percent(available)} of requests find a connection; {least} must"
        found.append(Failure(constraint="available", text=text))
    if workload.least_quality is not None and (candidate.quality is None or candidate.quality < workload.least_quality):
        has = "nobody measured it" if candidate.quality is None else significant(candidate.quality)
        found.append(
            Failure(constraint="quality", text=f"{has}; at least {significant(workload.least_quality)} is needed")
        )
    most = scenario.prices.most_per_month
    if most is not None and sum(money.values()) > most:
        text = f"{significant(sum(money.values()))} {scenario.prices.currency} a month; at most {significant(most)}"
        found.append(Failure(constraint="budget", text=text))
    return found


def _close(scenario: Scenario, times: Times | None) -> tuple[str, ...]:
    """Limits that hold for the prediction but not for the upper end of its interval."""
    if times is None:
        return ()
    upper = Times(times.ttft_s * times.ttft_spread, times.tpot_s * times.tpot_spread)
    return tuple(name for name, _, _ in costs.broken_times(upper, scenario.workload))


def _seconds(value: float) -> str:
    return format_quantity(value, "s")
