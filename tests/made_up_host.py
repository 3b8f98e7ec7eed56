"""A made-up host whose times follow simple laws, so that predictions can be worked out by hand."""

from __future__ import annotations

import datetime

from trilemma.core.device import load_device
from trilemma.core.host_tables import AttentionTime, HostTables, Overhead, ProductTime
from trilemma.formats.pack import format_bytes

FORMATS = (("f32", "f32"), ("bf16", "bf16"), ("int8-g32", "int8-g32"), ("int4-g32", "int8-g32"))
MAC_S = 1e-11  # of one multiply-accumulate, one token
STREAM_S = 5e-11  # more for each byte once the weights come from memory
SMALL, LARGE = 4_000_000, 128_000_000
POSITION_S = {"bf16": 1e-9, "int8": 2e-9, "f32": 3e-9}  # of one position, per query head and 64 wide, in decode


def product(name, activation, tokens, rows, cols, working_set, fixed_s=0.0):
    seconds = fixed_s + rows * cols * tokens * MAC_S
    if working_set > SMALL:
        seconds += format_bytes(name, (rows, cols)) * STREAM_S
    return ProductTime(
        format=name, activation=activation, threads=2, tokens=tokens, rows=rows, cols=cols,
        working_set_bytes=working_set, seconds=seconds,
    )  # fmt: skip


def products(fixed_s=0.0):
    shapes = [(rows, cols) for rows in (128, 512, 2048) for cols in (128, 512, 2048)]
    cached = [
        product(name, activation, tokens, rows, cols, SMALL, fixed_s)
        for name, activation in FORMATS
        for tokens in (1, 8, 128)
        for rows, cols in shapes
    ]
    streamed = [
        product(name, activation, tokens, 512, 512, LARGE, fixed_s)
        for name, activation in FORMATS
        for tokens in (1, 128)
    ]
    return tuple(cached + streamed)


def attention():
    return tuple(
        AttentionTime(kv=kv, threads=2, tokens=tokens, group=group, head_dim=head_dim,
                      seconds=seconds * head_dim / 64 * (group if tokens == 1 else 1))
        for kv, seconds in POSITION_S.items() for tokens in (1, 128) for group in (1, 2, 4) for head_dim in (32, 64)
    )  # fmt: skip


def overhead(tokens, **costs):
    nothing = dict.fromkeys(("step_s", "vocab_s", "block_s", "dim_s", "hidden_s", "heads_s"), 0.0)
    return Overhead(threads=2, tokens=tokens, **(nothing | costs))


def tables(**changes):
    plain = {
        "measured": datetime.date(2026, 11, 21), "cpu": "made up", "cores": 2, "isa": "avx512", "chunk": 128,
        "method": "by hand", "wake_s": 0.0, "products": products(), "attention": attention(),
        "overheads": (overhead(1), overhead(128)),
    }  # fmt: skip
    return HostTables(**(plain | changes))


def host(**changes):
    return load_device("laptop").model_copy(update={"name": "made-up", "host": tables(**changes)})
