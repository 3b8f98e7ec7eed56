"""The integer grids of the table: 2 to 8 bits, symmetric and asymmetric, in groups or a row; a codebook of 4 bits.

Those that end in '-k' are GGUF's K-quants (Q2_K to Q6_K): scales of two levels in supergroups of 256. `nl4-g32` has
the 16 values of GGUF's IQ4_NL, which lie closer together around zero, as weights do.
How a weight finds its code is `quantize.py`; how codes lie in memory is `panel16.py`.
"""

from __future__ import annotations

from trilemma.formats.grid import Format

INT8_CHANNEL = Format(name="int8-channel", bits=8)
INT8_G32 = Format(name="int8-g32", bits=8, group=32)
INT8_G128 = Format(name="int8-g128", bits=8, group=128)
INT6_G32 = Format(name="int6-g32", bits=6, group=32, layout="panel16.v2")
INT6_G64 = Format(name="int6-g64", bits=6, group=64, layout="panel16.v2")
INT6_G128 = Format(name="int6-g128", bits=6, group=128, layout="panel16.v2")
INT5_G32 = Format(name="int5-g32", bits=5, group=32, layout="panel16.v2")
INT5_G64 = Format(name="int5-g64", bits=5, group=64, layout="panel16.v2")
INT5_G128 = Format(name="int5-g128", bits=5, group=128, layout="panel16.v2")
INT5_G32_ASYM = Format(name="int5-g32-asym", bits=5, group=32, symmetric=False, layout="panel16.v2")
INT4_G32 = Format(name="int4-g32", bits=4, group=32)
INT4_G64 = Format(name="int4-g64", bits=4, group=64)
INT4_G128 = Format(name="int4-g128", bits=4, group=128)
INT4_G32_ASYM = Format(name="int4-g32-asym", bits=4, group=32, symmetric=False)
INT4_G64_ASYM = Format(name="int4-g64-asym", bits=4, group=64, symmetric=False)
INT4_G128_ASYM = Format(name="int4-g128-asym", bits=4, group=128, symmetric=False)
INT3_G16 = Format(name="int3-g16", bits=3, group=16, layout="panel16.v3")
INT3_G32 = Format(name="int3-g32", bits=3, group=32, layout="panel16.v3")
INT3_G64 = Format(name="int3-g64", bits=3, group=64, layout="panel16.v3")
INT3_G128 = Format(name="int3-g128", bits=3, group=128, layout="panel16.v3")
INT3_G32_ASYM = Format(name="int3-g32-asym", bits=3, group=32, symmetric=False, layout="panel16.v3")
INT3_G64_ASYM = Format(name="int3-g64-asym", bits=3, group=64, symmetric=False, layout="panel16.v3")
INT3_G128_ASYM = Format(name="int3-g128-asym", bits=3, group=128, symmetric=False, layout="panel16.v3")
INT2_G16_ASYM = Format(name="int2-g16-asym", bits=2, group=16, symmetric=False, layout="panel16.v3")
INT2_G32_ASYM = Format(name="int2-g32-asym", bits=2, group=32, symmetric=False, layout="panel16.v3")
INT2_G64_ASYM = Format(name="int2-g64-asym", bits=2, group=64, symmetric=False, layout="panel16.v3")
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NL4_G32 = Format(name="nl4-g32", bits=4, group=32, layout="panel16.v3", values=IQ4_NL_VALUES)
INT2_G16_K = Format(name="int2-g16-k", bits=2, group=16, symmetric=False, layout="panel16.v3", supergroup=256)
INT3_G16_K = Format(name="int3-g16-k", bits=3, group=16, layout="panel16.v3", supergroup=256)
INT4_G32_K = Format(name="int4-g32-k", bits=4, group=32, symmetric=False, layout="panel16.v2", supergroup=256)
INT5_G32_K = Format(name="int5-g32-k", bits=5, group=32, symmetric=False, layout="panel16.v2", supergroup=256)
INT6_G16_K = Format(name="int6-g16-k", bits=6, group=16, layout="panel16.v2", supergroup=256)
