"""What would help a diagnosed model, sorted into its structure, its decoding and the system around it.

A gain is after over before on this model: measured on a twin of random weights where one fits in
memory, else predicted from the measured shares of time, and labelled so. What a remedy does to
quality no twin can tell; the command beside it leads there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from trilemma.core.diagnosis import Complaint, Phase, PhaseDiagnosis, Ratio, Remedy, RemedyKind
from trilemma.core.environment import cpu_name
from trilemma.formats.artifact import weights_bytes
from trilemma.measure.bench import decode_bytes
from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.model_energy import precision_of
from trilemma.measure.stats import median_interval
from trilemma.measure.timing.interleave import Rounds
from trilemma.model.config import with_low_rank
from trilemma.model.cost import kv_bytes, macs_per_token
from trilemma.model.model import Model
from trilemma.runtime.draft_length import expected_tokens
from trilemma.runtime.engine import KvCache
from trilemma.search.diagnosis.deployed import Deployed, narrower, restructured, shallower, weight_bits
from trilemma.techniques.cost_twin import cost_twin
from trilemma.techniques.schemes import scheme_to_recipe

LEAST_KV_SHARE = 0.05  # of the bytes a token reads, below which a smaller cache is not worth a line
ACCEPTED = 0.7  # share of drafted tokens that a speculation's prediction assumes
DRAFT_COST = 0.15  # of the model's own time, for a draft model
DRAFTED = 3
_ORDER: dict[Complaint, str] = {"slow": "tpot", "large": "memory", "hungry": "energy"}
_CHANGES: Literal["changes: measure it"] = "changes: measure it"


@dataclass(frozen=True)
class Candidate:
    """A change of the model whose cost a twin can show. `kv`: precision of its cache, the base's own by default."""

    name: str
    what: str
    command: str
    make: Callable[[], Model]
    kind: RemedyKind = "model structure"
    note: str = ""
    kv: KvCache | None = None


@dataclass(frozen=True)
class Measured:
    """What a diagnosis hands over: the run, the twins, and the circumstances."""

    deployed: Deployed
    run: Rounds
    phases: Mapping[Phase, PhaseDiagnosis]
    twins: Mapping[str, Model]
    bytes_of: Mapping[str, int]
    threads: int
    other_threads: int
    kv_cache: str
    kv_share: float
    context: int
    given: str


def candidates(model: Model, kv_cache: str) -> list[Candidate]:
    """Changes worth trying on this model, each with the twin that shows its cost."""
    bits = weight_bits(model)
    found = []
    if bits > 8:
        found.append(_scheme(model, "W8A8-g32", "8-bit weights and inputs in groups of 32: close to lossless"))
    if bits > 4:
        found.append(_scheme(model, "W4A8-g32", "4-bit weights, 8-bit inputs; with -gptq and your text it loses less"))
    config = model.config
    if any(layer.ffn is not None and layer.ffn.hidden >= 128 for layer in config.layers):
        found.append(Candidate(
            "prune 25%", "a quarter of the feed-forward channels removed",
            "trilemma compress {model} -o OUT --scheme ffn25+bf16 --data TEXT",
            lambda: restructured(model, narrower(config, 0.75)), note="heal it with `trilemma distill` afterwards",
        ))  # fmt: skip
    if len(config.layers) >= 4:
        found.append(Candidate(
            "distil to 50%", "a student with half the layers, taught by this model",
            f"trilemma distill --teacher {{model}} --layers {len(config.layers) // 2} -o OUT --data TEXT",
            lambda: restructured(model, shallower(config, 0.5)), note="needs text and training time",
        ))  # fmt: skip
    attention = [layer.attention for layer in config.layers if layer.attention is not None]
    if kv_cache in ("f32", "bf16") and attention:
        found.append(Candidate(
            "KV cache in int8", "keys and values in 8 bits", "trilemma run {model} PROMPT --kv int8",
            lambda: model, kv="int8", note="more to gain the longer the context",
        ))  # fmt: skip
    return found


def _scheme(model: Model, name: str, what: str) -> Candidate:
    command = f"trilemma compress {{model}} -o OUT --scheme {name}"
    if name.startswith("W4"):
        command += "-gptq --data TEXT"
    alone = model.with_config(with_low_rank(model.config, 0))  # quantizing begins anew, without what made up for loss
    return Candidate(name, what, command, lambda: cost_twin(alone, scheme_to_recipe(name)))


def find_remedies(measured: Measured, complaint: Complaint | None) -> tuple[Remedy, ...]:
    """All remedies by kind, in each kind the greatest gain for the complaint first ('slow' when there is none)."""
    found = [*_structural(measured), *_decoding(measured), *_system(measured)]
    order = _ORDER[complaint or "slow"]
    kinds: tuple[RemedyKind, ...] = ("model structure", "decoding", "system")

    def key(remedy: Remedy) -> tuple[int, float]:
        gain = remedy.gains.get(order)
        return kinds.index(remedy.kind), gain.value if gain is not None else 1.0

    return tuple(sorted(found, key=key))


def _structural(m: Measured) -> list[Remedy]:
    made = []
    for item in candidates(m.deployed.model, m.kv_cache):
        if item.kv is not None and m.kv_share < LEAST_KV_SHARE:
            continue
        gains = _gains(m, item.name, m.twins[item.name], item.kv or m.kv_cache)
        kind: RemedyKind = "system" if item.kv is not None else item.kind
        made.append(Remedy(
            kind=kind, name=item.name, what=item.what, command=item.command.format(model=m.given),
            quality=_CHANGES, gains=gains, note=item.note,
        ))  # fmt: skip
    return made


def _gains(m: Measured, name: str, twin: Model, kv: str) -> dict[str, Ratio]:
    base = m.deployed.model
    read, read_now = decode_bytes(twin, kv, m.context), decode_bytes(base, m.kv_cache, m.context)
    macs, macs_now = macs_per_token(twin.config, m.context), macs_per_token(base.config, m.context)
    memory = weights_bytes(twin) + kv_bytes(twin.config, kv, m.context)
    memory_now = weights_bytes(base) + kv_bytes(base.config, m.kv_cache, m.context)
    if name in m.run.samples:
        tpot = _paired(m.run, name, "decode")
        ttft = _paired(m.run, name, "prefill")
    else:
        tpot = _predicted(m.phases["decode"], read / read_now, macs / macs_now)
        ttft = _predicted(m.phases["prefill"], weights_bytes(twin) / weights_bytes(base), macs / macs_now)
    seconds = m.phases["decode"].seconds.value
    energy = _joules(twin, seconds * tpot.value, m.threads, read, macs) / _joules(
        base, seconds, m.threads, read_now, macs_now
    )
    return {
        "tpot": tpot, "ttft": ttft, "memory": Ratio(value=memory / memory_now),
        "energy": Ratio(value=energy, source="estimated"),
    }  # fmt: skip


def _paired(run: Rounds, name: str, quantity: str, before: str = "base") -> Ratio:
    found = median_interval(run.of(name, quantity) / run.of(before, quantity))
    return Ratio(value=found.value, low=found.low, high=found.high)


def _predicted(phase: PhaseDiagnosis, bytes_share: float, macs_share: float) -> Ratio:
    """Each share of the time follows what it answers to."""
    shares = phase.shares
    value = shares["memory"].value * bytes_share + shares["compute"].value * macs_share + shares["overhead"].value
    return Ratio(value=value, source="predicted")


def _joules(model: Model, seconds: float, threads: int, read: float, macs: float) -> float:
    device = DEVICES[device_class(cpu_name())]
    return device.joules(seconds=seconds, cores=threads, read_bytes=read, macs=macs, precision=precision_of(model))


def break_even(cost: float, drafted: int) -> float | None:
    """The acceptance from which a pass that costs `cost` plain tokens gains; None where it never does."""
    if cost >= drafted + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, drafted) < cost else (low, middle)
    return high


def _decoding(m: Measured) -> list[Remedy]:
    verify = _paired(m.run, f"verify {DRAFTED + 1}", "decode", before="batch 1").value
    found = [
        _speculation("prompt look-up", "guesses from the prompt, for answers that repeat it",
                     f"trilemma run {m.given} PROMPT --lookup", verify),
        _speculation("draft model", f"a small model guesses {DRAFTED} tokens, one pass verifies them",
                     f"trilemma run {m.given} PROMPT --draft SMALL", verify + DRAFTED * DRAFT_COST,
                     f"; a draft of {DRAFT_COST:.0%} of the time"),
    ]  # fmt: skip
    half = _paired(m.run, "half prompt", "prefill")
    found.append(Remedy(
        kind="decoding", name="half the prompt", what="shorter instructions, fewer examples, less retrieved text",
        command=f"trilemma inspect {m.given} --diagnose --prompt N", quality=_CHANGES, gains={"ttft": half},
    ))  # fmt: skip
    return found


def _speculation(name: str, what: str, command: str, cost: float, more: str = "") -> Remedy:
    least = break_even(cost, DRAFTED)
    gain = Ratio(value=cost / expected_tokens(ACCEPTED, DRAFTED), source="predicted")
    begins = "never gains here" if least is None else f"gains from {least:.0%} on"
    note = f"at {ACCEPTED:.0%} accepted; {begins}{more}"
    return Remedy(
        kind="decoding", name=name, what=what, command=command, quality="unchanged", gains={"tpot": gain}, note=note
    )


def _system(m: Measured) -> list[Remedy]:
    batch = _paired(m.run, "batch 4", "decode", before="batch 1")
    share = Ratio(
        value=batch.value / 4, low=None if batch.low is None else batch.low / 4,
        high=None if batch.high is None else batch.high / 4,
    )  # fmt: skip
    found = [Remedy(
        kind="system", name="batches of 4",
        what="four requests in one pass; cost/token is that of all together",
        command=f"trilemma bench {m.given} --batch 1,2,4,8", quality="unchanged", gains={"tpot": batch, "cost": share},
    )]  # fmt: skip
    if "threads" in m.run.samples:
        gains = {"tpot": _paired(m.run, "threads", "decode"), "ttft": _paired(m.run, "threads", "prefill")}
        gains["energy"] = _thread_energy(m, gains["tpot"].value)
        found.append(Remedy(
            kind="system", name=f"{m.other_threads} thread{'s' * (m.other_threads > 1)}",
            what=f"instead of {m.threads}", command=f"trilemma run {m.given} PROMPT --threads {m.other_threads}",
            quality="unchanged", gains=gains,
        ))  # fmt: skip
    decode = m.phases["decode"]
    cause = "memory" if decode.shares["memory"].value >= decode.shares["compute"].value else "compute"
    faster = {"memory": (0.5, 1.0), "compute": (1.0, 0.5)}[cause]
    found.append(Remedy(
        kind="system", name=f"a device with twice the {'bandwidth' if cause == 'memory' else 'arithmetic'}",
        what="the time that answers to it halves", command=f"trilemma inspect {m.given} --device NAME",
        quality="unchanged",
        gains={"tpot": _predicted(decode, *faster), "ttft": _predicted(m.phases["prefill"], *faster)},
    ))  # fmt: skip
    return found


def _thread_energy(m: Measured, tpot: float) -> Ratio:
    model, seconds = m.deployed.model, m.phases["decode"].seconds.value
    read, macs = decode_bytes(model, m.kv_cache, m.context), macs_per_token(model.config, m.context)
    after = _joules(model, seconds * tpot, m.other_threads, read, macs)
    return Ratio(value=after / _joules(model, seconds, m.threads, read, macs), source="estimated")
