"""Damage: valid files in, damaged ones out, each decided by its seed alone.

Half of the mutants are blind (bits, ranges, lengths, cuts); half know the format and lie in its own words: sizes,
offsets, types, names, nesting.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS = (0, 1, 2, 7, 31, 255, 4097, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *NUMBERS, -1, -(1 << 31), 0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan"), True, False, None, "", "\ud800",
    "../../x", "nan", [], [[]], {}, [0], ["a"], {"a": 1}, 10**400,
)  # fmt: skip
BITS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


def blind(raw: bytes, rng: random.Random, header: int) -> bytes:
    """A few changes that know nothing, most of them in the first `header` bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if not data:
            break
        end = min(header, len(data)) if rng.random() < 0.8 else len(data)
        rng.choice(BLIND)(data, rng.randrange(max(1, end)), rng)
    return bytes(data)


def _bit(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.randrange(256)


def _range(data: bytearray, at: int, rng: random.Random) -> None:
    size = min(rng.choice((2, 4, 8, 64, 4096)), len(data) - at)
    data[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _number(data: bytearray, at: int, rng: random.Random) -> None:
    size, value = rng.choice((4, 8)), rng.choice((*NUMBERS, len(data), len(data) - 1, rng.randrange(1 << 16)))
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _delete(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 4, 8, 100))]


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))


def _repeat(data: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice((8, 32, 200))
    data[at:at] = data[at : at + size]


BLIND: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _bit, _bit, _byte, _range, _number, _number, _cut, _delete, _insert, _repeat,
)  # fmt: skip


def json_text(raw: bytes, rng: random.Random) -> bytes:
    """A JSON document with some of its values, keys or levels changed."""
    tree = json.loads(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parents = [node for node in _containers(tree) if node]
        if not parents:
            break
        parent = rng.choice(parents)
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        what = rng.random()
        if what < 0.6:
            parent[key] = _other(parent[key], rng)
        elif what < 0.75:
            del parent[key]
        elif what < 0.85:
            deep: Any = 0
            for _ in range(rng.choice((3, 900))):
                deep = [deep]
            parent[key] = deep
        elif isinstance(parent, dict):
            parent[rng.choice(("x", "", "__metadata__", "é\x00"))] = parent[key]
        else:
            parent.append(parent[key])
    text = json.dumps(tree)
    if rng.random() < 0.05:
        text = text.replace("{", "[" * 100_000 + "{", 1)
    return text.encode("utf-8", errors="surrogatepass")


def _containers(tree: Any) -> list[Any]:
    """All objects and arrays, those within others too, down to a depth that no real file has."""
    found, level = [], [tree]
    for _ in range(20):
        level = [node for node in level if isinstance(node, dict | list)]
        found += level
        level = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
    return found


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value + 64, value << 40))
    return rng.choice(VALUES)


def safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Lies in the header of a safetensors file; its length is right, or not."""
    size = int.from_bytes(raw[:8], "little")
    text = json_text(raw[8 : 8 + size], rng)
    if rng.random() < 0.15:  # a name twice
        text = text.replace(b"{", b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', 2)
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return (length & ((1 << 64) - 1)).to_bytes(8, "little") + text + raw[8 + size :]


class Gguf:
    """A GGUF file in its parts: metadata as (key, type, encoded value), tensors as [name, sizes, type, offset]."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 4
        self.version, count, entries = self._take("<I"), self._take("<Q"), self._take("<Q")
        self.metadata = [self._entry() for _ in range(entries)]
        self.tensors = [self._tensor() for _ in range(count)]
        self.data = raw[-(-self._at // 32) * 32 :]

    def _take(self, form: str) -> Any:
        value = struct.unpack_from(form, self._raw, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> bytes:
        size = self._take("<Q")
        self._at += size
        return self._raw[self._at - size : self._at]

    def _entry(self) -> list[Any]:
        key, kind, start = self._string(), self._take("<I"), self._at
        self._skip(kind)
        return [key, kind, self._raw[start : self._at]]

    def _skip(self, kind: int) -> None:
        if kind == 8:
            self._string()
        elif kind == 9:
            inner, count = self._take("<I"), self._take("<Q")
            for _ in range(count):
                self._skip(inner)
        else:
            self._at += struct.calcsize(BITS[kind])

    def _tensor(self) -> list[Any]:
        name = self._string()
        sizes = [self._take("<Q") for _ in range(self._take("<I"))]
        return [name, sizes, self._take("<I"), self._take("<Q")]

    def bytes(self) -> bytes:
        head = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))]
        for key, kind, value in self.metadata:
            head += [_gguf_string(key), struct.pack("<I", kind & 0xFFFFFFFF), value]
        for name, sizes, kind, offset in self.tensors:
            head += [_gguf_string(name), struct.pack("<I", len(sizes)), *(_u64(size) for size in sizes),
                     struct.pack("<I", kind & 0xFFFFFFFF), _u64(offset)]  # fmt: skip
        text = b"".join(head)
        return text + bytes(-len(text) % 32) + self.data


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value & ((1 << 64) - 1))


def _gguf_string(text: bytes) -> bytes:
    return _u64(len(text)) + text


def gguf(raw: bytes, rng: random.Random) -> bytes:
    """Lies in the words of GGUF: sizes, offsets, types, names, metadata of another type, nested arrays."""
    file = Gguf(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.5 and file.tensors:
            _lie_of_tensor(file, rng)
        elif file.metadata:
            _lie_of_metadata(file, rng)
    return file.bytes()


def _lie_of_tensor(file: Gguf, rng: random.Random) -> None:
    one, other = rng.choice(file.tensors), rng.choice(file.tensors)
    what = rng.randrange(8)
    if what == 0:
        one[1][rng.randrange(len(one[1]))] = rng.choice((*NUMBERS, 16, 32, 48, 256))
    elif what == 1:
        one[3] = rng.choice((other[3], one[3] + 1, one[3] + 2, len(file.data), len(file.data) - 1, *NUMBERS))
    elif what == 2:
        one[2] = rng.choice((*range(42), 1 << 31))
    elif what == 3:
        one[0] = rng.choice(
            (other[0], b"\xff\xfe\x00", b"", b"rope_freqs.weight", b"x" * 70000, b"blk.99.attn_q.weight")
        )
    elif what == 4:
        file.tensors.append([*one])
    elif what == 5:
        file.tensors.remove(one)
    elif what == 6:
        one[1] = rng.choice(([], [1], [*one[1], 1], [1, *one[1]], one[1][::-1], [1] * 9, one[1][:1]))
    else:
        one[1], one[2] = other[1], other[2]


def _lie_of_metadata(file: Gguf, rng: random.Random) -> None:
    one = rng.choice(file.metadata)
    what = rng.randrange(7)
    if what == 0:
        one[1:] = rng.choice(_SOME_VALUES)
    elif what == 1 and one[1] in BITS:
        width = struct.calcsize(BITS[one[1]])
        one[2] = rng.choice(((rng.choice(NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little"), b"\xff" * width))
    elif what == 2:
        one[0] = rng.choice((rng.choice(file.metadata)[0], b"\xff", b"", b"general.alignment"))
    elif what == 3:
        file.metadata.remove(one)
    elif what == 4:
        file.metadata.append([*one])
    elif what == 5:
        one[1] = rng.choice((*range(14), 255, 1 << 31))
    else:
        file.version = rng.choice((0, 1, 2, 4, 1 << 24, 1 << 31))


def _nested(depth: int) -> list[Any]:
    return [9, struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 0)]


_SOME_VALUES: tuple[list[Any], ...] = (
    [8, _gguf_string(b"\xff\xfe")], [8, _gguf_string(b"")], [8, _gguf_string(b"llama")], [8, _u64((1 << 64) - 1)],
    [4, struct.pack("<I", 0)], [4, struct.pack("<I", 0xFFFFFFFF)], [4, struct.pack("<I", 3)], [10, _u64(1 << 40)],
    [11, struct.pack("<q", -1)], [6, struct.pack("<f", float("nan"))], [6, struct.pack("<f", 1e-45)],
    [12, struct.pack("<d", 1e308)], [12, struct.pack("<d", -1.0)], [7, b"\x02"], [7, b"\x01"],
    [9, struct.pack("<IQ", 4, 0)], [9, struct.pack("<IQ", 4, 1 << 62)], [9, struct.pack("<IQ", 8, 1 << 61)],
    [9, struct.pack("<IQ", 8, 3) + _gguf_string(b"\xff") * 3], [9, struct.pack("<IQ3I", 4, 3, 0, 1, 1 << 31)],
    [9, struct.pack("<IQ2f", 6, 2, float("nan"), float("inf"))], [9, struct.pack("<IQ", 99, 1)],
    _nested(1), _nested(20000),
)  # fmt: skip
