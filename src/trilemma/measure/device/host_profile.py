"""This host as a device profile that can be carried elsewhere: everything is measured once, in turns, in minutes."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from trilemma.core.device import Arithmetic, Device, Figure
from trilemma.core.environment import cpu_name, total_memory_bytes, usable_cores
from trilemma.core.host_tables import HostTables, MacRate, ReadRate
from trilemma.formats.pack import format_bytes
from trilemma.measure.device import check_cases
from trilemma.measure.device.ceilings import read_bandwidth
from trilemma.measure.device.compute_ceiling import compute_rate
from trilemma.measure.device.engine_probe import (
    CHUNK,
    AttentionKey,
    StepKey,
    attention_probes,
    attention_times,
    overheads,
    step_probes,
)
from trilemma.measure.device.product_probe import ProductKey, product_probes, undisturbed
from trilemma.measure.device.step_time import step_attention_s
from trilemma.measure.device.surroundings import battery_wh, cache_sizes, power_figures, storage_rate
from trilemma.measure.device.tries import Try, method, take_turns, typical
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.timing.noise import ReferenceLoop
from trilemma.model.model import Activation
from trilemma.runtime.native import supported_isas

Progress = Callable[[float, float, str], None]
_RATES: tuple[tuple[Arithmetic, str, Activation], ...] = (
    ("f32", "f32", "f32"),
    ("bf16", "bf16", "bf16"),
    ("int8", "int8-g32", "int8-g32"),
)
_LEAST_BASE, _LEAST_STREAM, _MOST_STREAM = 4 << 20, 48 << 20, 512 << 20


@dataclass(frozen=True)
class Effort:
    """How much is measured. rounds and seconds of the tables, and of the check cases; quick: a thinner table."""

    rounds: int = 32
    tables_s: float = 120.0
    check_rounds: int = 8
    check_s: float = 45.0
    quick: bool = False


QUICK = Effort(rounds=6, tables_s=25.0, check_rounds=4, check_s=12.0, quick=True)


def profile_host(
    *,
    name: str = "host",
    threads: Sequence[int] | None = None,
    effort: Effort | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Device:
    """Measure this host.

    Args:
        threads: numbers of threads that kernels are timed with; all usable cores by default.
        folder: where a temporary file tells the storage's rate; nowhere by default.
        progress: called with (done, total, what), shares of the whole.
    """
    effort, counts = effort or Effort(), tuple(sorted(set(threads or (usable_cores(),))))

    def said(begin: float, end: float, what: str) -> Callable[[float], None]:
        def update(share: float) -> None:
            if progress is not None:
                done = begin + (end - begin) * share
                progress(done, 1.0, f"{what}, {done:.0%} of all")

        update(0.0)
        return update

    caches = cache_sizes()
    said(0.0, 0.1, "making matrices")
    tries = _tries(counts, working_sets(caches), effort.quick)
    with ReferenceLoop(counts[-1]) as loop:
        loop.probe()
        samples = take_turns(
            tries, rounds=effort.rounds, most_s=effort.tables_s, progress=said(0.1, 0.7, "kernel times"),
            after_round=loop.probe,
        )  # fmt: skip
        noisy = loop.reason
    tries.clear()
    update = said(0.7, 0.8, "peak rates")
    tables = tables_of(samples, counts[-1], noisy)
    tables = tables.model_copy(
        update={"read_rates": read_rates(caches), "mac_rates": mac_rates(counts[-1], quick=effort.quick)}
    )
    update(1.0)
    device = _device(name, tables, folder)
    checks = check_cases.check(
        device, rounds=effort.check_rounds, most_s=effort.check_s, progress=said(0.8, 1.0, "check cases")
    )
    return with_checks(device, checks)


def working_sets(caches: dict[int, int]) -> tuple[int, ...]:
    """Bytes walked over: in the last cache but not in the second, around the last one's size, and far beyond it."""
    base = max(_LEAST_BASE, 2 * caches[2])
    last = max(caches[3], 2 * base)
    stream = min(max(4 * last, _LEAST_STREAM), _MOST_STREAM)
    between = [size for size in (last // 3, 3 * last // 4, 3 * last // 2) if base < size < stream]
    return (base, *between, stream)


def with_checks(device: Device, checks: Sequence[Any]) -> Device:
    """The profile with the errors of its check cases, which its uncertainty factors follow."""
    assert device.host is not None
    host = device.host.model_copy(update={"checks": tuple(checks)})
    factors = {}
    for key, quantity in (("decode_factor", "tpot_s"), ("prefill_factor", "ttft_s")):
        errors = host.errors("tpot_s" if quantity == "tpot_s" else "ttft_s")
        factors[key] = Figure(
            value=1 + float(np.quantile(errors, 0.9)), basis="measured",
            claim=f"90th percentile of the error of {len(errors)} check cases, {quantity}",
        )  # fmt: skip
    return device.model_copy(update={"host": host, **factors})


def _tries(counts: Sequence[int], sets: tuple[int, ...], quick: bool) -> dict[Any, Try]:
    tries: dict[Any, Try] = dict(product_probes(counts, sets, quick=quick))
    tries |= dict(attention_probes(counts, quick=quick))
    return tries | dict(step_probes(counts))


def tables_of(samples: Mapping[Any, Sequence[float]], threads: int, noisy: str | None) -> HostTables:
    """Tables from raw samples by key."""
    seconds = {key: typical(found, noisy=noisy is not None) for key, found in samples.items()}
    products = undisturbed({key: found for key, found in seconds.items() if isinstance(key, ProductKey)})
    steps = {key: found for key, found in seconds.items() if isinstance(key, StepKey)}
    attention = attention_times({key: found for key, found in seconds.items() if isinstance(key, AttentionKey)})
    attended = {
        (key.shape, key.threads, key.tokens): step_attention_s(
            attention, key.shape.config(), "bf16", key.tokens, key.depth, key.threads, head=True
        )
        for key in steps
    }
    rounds = min(map(len, samples.values()))
    return HostTables(
        measured=datetime.date.today(), cpu=cpu_name(), cores=usable_cores(), isa=supported_isas()[-1], chunk=CHUNK,
        method=f"{method(noisy is not None)}, {rounds} of each", noisy=noisy,
        products=tuple(key.row(found) for key, found in products.items()), attention=attention,
        overheads=overheads(steps, attended), wake_s=_wake_s(products, threads),
    )  # fmt: skip


def _wake_s(products: Mapping[ProductKey, float], threads: int) -> float:
    """What the smallest shared job takes beyond its work, from the difference between two and four tokens of it."""
    if threads == 1:
        return 0.0
    times = {
        key.tokens: found
        for key, found in products.items()
        if (key.format, key.rows, key.cols, key.threads) == ("int8-g32", 128, 128, threads)
    }
    return max(0.0, 2 * times[2] - times[4]) if {2, 4} <= set(times) else 0.0


def read_rates(caches: dict[int, int]) -> tuple[ReadRate, ...]:
    """Best of several probes at sizes within the second cache, within the last one, and far beyond it."""
    cores, found = usable_cores(), []
    counts = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64) if n < cores), cores})
    for threads in counts:
        for level, size in (
            ("L2", threads * caches[2] // 2), ("L3", caches[3] // 2), ("memory", max(4 * caches[3], 256 << 20)),
        ):  # fmt: skip
            best = read_bandwidth(threads, size)
            found.append(
                ReadRate(
                    threads=threads, level=level, working_set_bytes=best.working_set_bytes,
                    bytes_per_s=best.bytes_per_s,
                )
            )  # fmt: skip
    return tuple(found)


def mac_rates(threads: int, *, quick: bool = False) -> tuple[MacRate, ...]:
    """Best rate of the engine's kernels by instruction set and input precision."""
    isas = (
        supported_isas()[-1:] if quick else supported_isas()[1:] or supported_isas()
    )  # scalar is the tests' reference
    return tuple(
        MacRate(
            isa=isa, precision=precision, threads=count,
            macs_per_s=compute_rate(format_name, activation, count, cast(Any, isa)).macs_per_s,
        )
        for isa in isas
        for precision, format_name, activation in _RATES
        for count in sorted({1, threads})
    )  # fmt: skip


def _device(name: str, tables: HostTables, folder: Path | None) -> Device:
    """The figures of a profile, each with how it was come by."""
    threads = tables.threads[-1]
    constants = DEVICES[device_class(tables.cpu)]
    memory, bandwidth = float(total_memory_bytes()), _memory_rate(tables)
    reached = max(_streamed_rates(tables), default=bandwidth)
    rates = {r.precision: r for r in tables.mac_rates if r.isa == tables.isa and r.threads == threads}
    idle, active = power_figures(constants, threads, _busy(threads))
    stored = None if folder is None else storage_rate(folder)
    capacity, times = battery_wh(), "best of several tries"
    fallback = "nowhere to write a test file; a common solid-state disk"
    return Device(
        name=name, title=f"{tables.cpu}, {tables.cores} cores ({platform.machine()})", kind=cast(Any, constants.name),
        runtime=f"the native engine on {threads} threads ({tables.isa})",
        memory_bytes=_measured(memory, "as the system says"),
        usable_bytes=Figure(value=0.85 * memory, basis="assumed", claim="the rest is left to the system"),
        bandwidth_bytes_per_s=_measured(bandwidth, f"reading far more than the caches hold, {times}"),
        bandwidth_share=_measured(min(1.0, reached / bandwidth), "what one token's products reach of it"),
        macs_per_s={p: _measured(r.macs_per_s, f"kernels in cache, {times}") for p, r in rates.items()},
        overhead_s=_measured(_typical_overhead(tables), "24 layers x 1024: all but products and attention"),
        idle_w=idle, active_w=active,
        byte_pj=Figure(value=constants.byte_pj, basis="assumed", claim=f"class '{constants.name}': {constants.source}"),
        mac_pj={p: Figure(value=v, basis="assumed", claim="as the class") for p, v in constants.mac_pj.items()},
        battery_wh=None if capacity is None else _measured(capacity, "full charge, as the gauge says"),
        storage_bytes_per_s=_measured(stored, f"a file of 201 MB past the system's cache, {times}") if stored
        else Figure(value=5e8, basis="assumed", claim=fallback),
        decode_factor=Figure(value=1.2, basis="assumed", claim="not checked yet"),
        prefill_factor=Figure(value=1.2, basis="assumed", claim="not checked yet"),
        energy_factor=Figure(value=constants.factor, basis="assumed", claim=f"of the class '{constants.name}'"),
        checked_bytes=_measured(5e6, "the smallest check case reads about so much a token"),
        host=tables,
    )  # fmt: skip


def _measured(value: float, claim: str) -> Figure:
    return Figure(value=value, basis="measured", claim=claim)


def _memory_rate(tables: HostTables) -> float:
    return max(rate.bytes_per_s for rate in tables.read_rates if rate.level == "memory")


def _streamed_rates(tables: HostTables) -> list[float]:
    most = max(row.working_set_bytes for row in tables.products)
    return [
        format_bytes(row.format, (row.rows, row.cols)) / row.seconds
        for row in tables.products
        if row.tokens == 1 and row.working_set_bytes > most // 2 and row.threads == tables.threads[-1]
    ]


def _typical_overhead(tables: HostTables) -> float:
    row = next(r for r in tables.overheads if r.threads == tables.threads[-1] and r.tokens == 1)
    layers, dim, hidden, heads, vocab = 24, 1024, 2816, 2048, 32000
    inner = 2 * (row.block_s + row.dim_s * dim) + row.hidden_s * hidden + row.heads_s * heads
    return max(row.step_s + row.vocab_s * vocab + layers * inner, 1e-9)


def _busy(threads: int) -> Callable[[], object]:
    return lambda: compute_rate("int8-g32", "int8-g32", threads)
