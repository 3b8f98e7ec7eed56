"""The integer grids of the table: int8 a row or a group, int5 and int4 symmetric and asymmetric in groups.

Those that end in '-k' are GGUF's K-quants (Q4_K, Q5_K, Q6_K): scales of two levels in supergroups of 256.
How a weight finds its code is `quantize.py`; how codes lie in memory is `panel16.py`.
"""

from __future__ import annotations

from trilemma.formats.grid import Format

INT8_CHANNEL = Format(name="int8-channel", bits=8)
INT8_G32 = Format(name="int8-g32", bits=8, group=32)
INT8_G128 = Format(name="int8-g128", bits=8, group=128)
INT4_G32 = Format(name="int4-g32", bits=4, group=32)
INT4_G64 = Format(name="int4-g64", bits=4, group=64)
INT4_G128 = Format(name="int4-g128", bits=4, group=128)
INT4_G32_ASYM = Format(name="int4-g32-asym", bits=4, group=32, symmetric=False)
INT4_G64_ASYM = Format(name="int4-g64-asym", bits=4, group=64, symmetric=False)
INT4_G128_ASYM = Format(name="int4-g128-asym", bits=4, group=128, symmetric=False)
INT5_G32 = Format(name="int5-g32", bits=5, group=32, layout="panel16.v2")
INT5_G32_ASYM = Format(name="int5-g32-asym", bits=5, group=32, symmetric=False, layout="panel16.v2")
INT4_G32_K = Format(name="int4-g32-k", bits=4, group=32, symmetric=False, layout="panel16.v2", supergroup=256)
INT5_G32_K = Format(name="int5-g32-k", bits=5, group=32, symmetric=False, layout="panel16.v2", supergroup=256)
INT6_G16_K = Format(name="int6-g16-k", bits=6, group=16, layout="panel16.v2", supergroup=256)
