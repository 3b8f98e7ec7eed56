"""How one weight matrix is stored: the grid of values, the byte layout, packing and unpacking.

Table of storage formats. `f32` and `bf16` lie row by row (layout `rows.v1`); quantized formats lie
in panels of 16 rows (`panel16.v1` to `panel16.v3`, see `panel16.py`).
"""

from __future__ import annotations

from trilemma.core.registry import Registry
from trilemma.formats.grid import Format

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "f32": "trilemma.formats.plain:F32",
        "f16": "trilemma.formats.plain:F16",
        "bf16": "trilemma.formats.plain:BF16",
        "int8-channel": "trilemma.formats.integer:INT8_CHANNEL",
        "int8-g32": "trilemma.formats.integer:INT8_G32",
        "int8-g128": "trilemma.formats.integer:INT8_G128",
        "int6-g32": "trilemma.formats.integer:INT6_G32",
        "int6-g64": "trilemma.formats.integer:INT6_G64",
        "int6-g128": "trilemma.formats.integer:INT6_G128",
        "int5-g32": "trilemma.formats.integer:INT5_G32",
        "int5-g64": "trilemma.formats.integer:INT5_G64",
        "int5-g128": "trilemma.formats.integer:INT5_G128",
        "int5-g32-asym": "trilemma.formats.integer:INT5_G32_ASYM",
        "int4-g32": "trilemma.formats.integer:INT4_G32",
        "int4-g64": "trilemma.formats.integer:INT4_G64",
        "int4-g128": "trilemma.formats.integer:INT4_G128",
        "int4-g32-asym": "trilemma.formats.integer:INT4_G32_ASYM",
        "int4-g64-asym": "trilemma.formats.integer:INT4_G64_ASYM",
        "int4-g128-asym": "trilemma.formats.integer:INT4_G128_ASYM",
        "nl4-g32": "trilemma.formats.integer:NL4_G32",
        "int3-g16": "trilemma.formats.integer:INT3_G16",
        "int3-g32": "trilemma.formats.integer:INT3_G32",
        "int3-g64": "trilemma.formats.integer:INT3_G64",
        "int3-g128": "trilemma.formats.integer:INT3_G128",
        "int3-g32-asym": "trilemma.formats.integer:INT3_G32_ASYM",
        "int3-g64-asym": "trilemma.formats.integer:INT3_G64_ASYM",
        "int3-g128-asym": "trilemma.formats.integer:INT3_G128_ASYM",
        "int2-g16-asym": "trilemma.formats.integer:INT2_G16_ASYM",
        "int2-g32-asym": "trilemma.formats.integer:INT2_G32_ASYM",
        "int2-g64-asym": "trilemma.formats.integer:INT2_G64_ASYM",
        "int2-g16-k": "trilemma.formats.integer:INT2_G16_K",
        "int3-g16-k": "trilemma.formats.integer:INT3_G16_K",
        "int4-g32-k": "trilemma.formats.integer:INT4_G32_K",
        "int5-g32-k": "trilemma.formats.integer:INT5_G32_K",
        "int6-g16-k": "trilemma.formats.integer:INT6_G16_K",
    },
)

__all__ = ["FORMATS", "Format"]
