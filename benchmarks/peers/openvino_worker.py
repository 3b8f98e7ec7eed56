"""OpenVINO runs a dump of weights (see dump.py): builds the graph, gives logits, takes times, without Trilemma.

    python openvino_worker.py '{"do": "build", "dump": FOLDER, "model": "m.xml"}'
    python openvino_worker.py '{"do": "bench", "model": "m.xml", "threads": 2, "cells": [...]}'

The graph is what optimum-intel exports for llama, so that the plugin's fusions find their patterns: RMS norm,
rotation, group-wise compressed weights, attention with a cache in the plugin's own state. Only the last position
goes through the head. Prints one JSON object on its last line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset6, opset8, opset13
from worker_loop import answer

Node = Any
F32 = np.float32
_HELD: list[np.ndarray] = []  # a constant over a tensor reads the array until the model is saved


class Graph:
    """Builds the decoder of one dump, a layer at a time."""

    def __init__(self, dump: Path, weights: str) -> None:
        self.dump, self.weights = dump, weights
        self.about = json.loads((dump / "model.json").read_text())
        self.sinks: list[Node] = []

    def model(self) -> ov.Model:
        about = self.about
        ids = opset13.parameter([-1, -1], ov.Type.i64, name="input_ids")  # (batch, time)
        positions = opset13.parameter([-1, -1], ov.Type.i64, name="position_ids")  # (batch, time)
        beam = opset13.parameter([-1], ov.Type.i32, name="beam_idx")  # (batch,)
        for node in (ids, positions, beam):
            node.output(0).set_names({node.get_friendly_name()})
        batch = opset13.gather(opset13.shape_of(ids), _int(0), _int(0))
        x = self._embed(ids)  # (batch, time, dim)
        turn, self.mask = self._rotation(positions), self._mask(positions)
        for layer in range(about["layers"]):
            normed = self._norm(x, f"layers.{layer}.attention_norm.weight")
            x = opset13.add(x, self._attention(normed, f"layers.{layer}.attention", turn, beam, batch))
            normed = self._norm(x, f"layers.{layer}.ffn_norm.weight")
            x = opset13.add(x, self._ffn(normed, f"layers.{layer}.ffn"))
        last = opset8.slice(x, _ints(-1), _ints(2**31 - 1), _ints(1), _ints(1))  # (batch, 1, dim)
        head = "embedding.weight" if about["tied"] else "head.weight"
        logits = self._product(self._norm(last, "final_norm.weight"), head)
        logits.output(0).set_names({"logits"})
        return ov.Model([opset13.result(logits)], self.sinks, [ids, positions, beam], "decoder")

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.dump / f"{name}.npy")

    def _embed(self, ids: Node) -> Node:
        """Rows of codes and of scales are gathered, then multiplied: no table in floating point."""
        codes, scales = self._load("embedding.weight.codes"), self._load("embedding.weight.scales")
        groups = scales.shape[1]
        rows = opset13.gather(_constant(codes.reshape(len(codes), groups, -1)), ids, _int(0))
        scale = opset13.gather(_constant(scales[..., None].astype(F32)), ids, _int(0))
        values = opset13.multiply(opset13.convert(rows, "f32"), scale)
        return opset13.reshape(values, _ints(0, 0, self.about["dim"]), True)

    def _product(self, x: Node, name: str) -> Node:
        """x times a matrix in the plugin's pattern of compressed weights, groups along the input."""
        codes, scales = self._load(f"{name}.codes"), self._load(f"{name}.scales")
        rows, columns, groups = *codes.shape, scales.shape[1]
        grouped = codes.reshape(rows, groups, columns // groups)
        weight = opset13.convert(_codes(grouped, self.about["bits"], self.weights), "f16")
        if self.weights.startswith("u"):
            zero = opset13.convert(_codes(np.zeros((1, 1, 1), np.int8), self.about["bits"], self.weights), "f16")
            weight = opset13.subtract(weight, zero)
        weight = opset13.multiply(weight, _constant(scales[..., None]))
        weight = opset13.convert(opset13.reshape(weight, _ints(rows, columns), False), "f32")
        return opset13.matmul(x, weight, False, True)

    def _norm(self, x: Node, name: str) -> Node:
        square = opset13.power(x, _constant(np.full((1, 1, 1), 2, F32)))
        mean = opset13.reduce_mean(square, _ints(-1), True)
        root = opset13.sqrt(opset13.add(mean, _constant(np.full((1, 1, 1), self.about["eps"], F32))))
        x = opset13.multiply(x, opset13.divide(_constant(np.full((1, 1, 1), 1, F32)), root))
        return opset13.multiply(_constant(self._load(name)[None, None]), x)

    def _rotation(self, positions: Node) -> tuple[Node, Node]:
        """cos and sin, (batch, 1, time, head_dim)."""
        about = self.about
        inverse = np.asarray(about["inverse_frequencies"], F32)[None, :, None]
        at = opset13.unsqueeze(opset13.convert(positions, "f32"), _int(1))  # (batch, 1, time)
        angles = opset13.transpose(opset13.matmul(_constant(inverse), at, False, False), _ints(0, 2, 1))
        both = opset13.concat([angles, angles], -1)
        found = []
        for node in (opset13.cos(both), opset13.sin(both)):
            if about["attention_factor"] != 1:
                node = opset13.multiply(node, _constant(np.full((1, 1, 1), about["attention_factor"], F32)))
            found.append(opset13.unsqueeze(node, _int(1)))
        return found[0], found[1]

    def _mask(self, positions: Node) -> Node:
        """0 where a position may look and the lowest number elsewhere, (batch, 1, time, all positions)."""
        end = opset13.add(opset13.reduce_max(positions, _ints(0, 1), False), _int(1))
        there = opset13.range(_int(0), end, _int(1), "i64")
        seen = opset13.less_equal(there, opset13.unsqueeze(positions, _ints(1, 3)))
        return opset13.select(seen, _constant(np.asarray(0, F32)), _constant(np.asarray(np.finfo(F32).min, F32)))

    def _turned(self, x: Node, turn: tuple[Node, Node]) -> Node:
        half = self.about["head_dim"] // 2
        first = opset8.slice(x, _ints(0), _ints(half), _ints(1), _ints(3))
        second = opset8.slice(x, _ints(half), _ints(2**31 - 1), _ints(1), _ints(3))
        minus = opset13.multiply(second, _constant(np.full((1, 1, 1, 1), -1, F32)))
        rotated = opset13.concat([minus, first], -1)
        return opset13.add(opset13.multiply(x, turn[0]), opset13.multiply(rotated, turn[1]))

    def _attention(self, x: Node, at: str, turn: tuple[Node, Node], beam: Node, batch: Node) -> Node:
        about = self.about
        heads, kv_heads, size = about["heads"], about["kv_heads"], about["head_dim"]

        def split(role: str, count: int) -> Node:  # (batch, heads, time, head_dim)
            flat = opset13.reshape(self._product(x, f"{at}.{role}.weight"), _ints(0, 0, count, size), True)
            return opset13.transpose(flat, _ints(0, 2, 1, 3))

        query = self._turned(split("q", heads), turn)
        key = self._remembered(self._turned(split("k", kv_heads), turn), f"{at}.k", beam, batch)
        value = self._remembered(split("v", kv_heads), f"{at}.v", beam, batch)
        if heads != kv_heads:
            key, value = self._repeated(key), self._repeated(value)
        usual = size**-0.5  # a scale of its own would keep the plugin from its fused attention
        if abs(about["scale"] / usual - 1) > 1e-6:
            query = opset13.multiply(query, _constant(np.full((1, 1, 1, 1), about["scale"] / usual, F32)))
        found = opset13.scaled_dot_product_attention(query, key, value, self.mask)
        merged = opset13.reshape(opset13.transpose(found, _ints(0, 2, 1, 3)), _ints(0, 0, heads * size), True)
        return self._product(merged, f"{at}.o.weight")

    def _ffn(self, x: Node, at: str) -> Node:
        gate = opset13.swish(self._product(x, f"{at}.gate.weight"))
        return self._product(opset13.multiply(gate, self._product(x, f"{at}.up.weight")), f"{at}.down.weight")

    def _remembered(self, new: Node, name: str, beam: Node, batch: Node) -> Node:
        """The cache of one layer with the new positions behind it."""
        kv_heads, size = self.about["kv_heads"], self.about["head_dim"]
        shape = opset13.concat([opset13.unsqueeze(batch, _int(0)), _ints(kv_heads, 0, size)], 0)
        empty = opset13.broadcast(_constant(np.asarray(0, F32)), shape)
        past = opset6.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, kv_heads, -1, size]))
        kept = opset8.gather(past, beam, _int(0))
        whole = opset13.concat([kept, new], 2)
        self.sinks.append(opset6.assign(whole, name))
        return whole

    def _repeated(self, x: Node) -> Node:
        """KV heads once for each query head that shares them; the plugin reads them in place."""
        kv_heads, size = self.about["kv_heads"], self.about["head_dim"]
        times = self.about["heads"] // kv_heads
        ones = _constant(np.ones((1, 1, times, 1, 1), F32))  # the fused attention takes this form of a broadcast
        wide = opset13.multiply(opset13.unsqueeze(x, _int(2)), ones)
        return opset13.reshape(wide, _ints(0, kv_heads * times, -1, size), True)


def _constant(values: np.ndarray) -> Node:
    return opset13.constant(values)


def _int(value: int) -> Node:
    return opset13.constant(np.asarray(value, np.int64))


def _ints(*values: int) -> Node:
    return opset13.constant(np.asarray(values, np.int64))


def _codes(codes: np.ndarray, bits: int, weights: str) -> Node:
    """A constant of i8 or u8, or of i4 or u4 with two codes in a byte, low half first; half the range added for u."""
    raised = codes.view(np.uint8) + np.uint8(1 << (bits - 1) if weights.startswith("u") else 0)
    if bits == 8:
        return _constant(raised if weights == "u8" else codes)
    flat = raised.reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    packed = (flat[0::2] & 15) | (flat[1::2] << 4)
    kind = ov.Type.u4 if weights == "u4" else ov.Type.i4
    _HELD.append(packed)
    return ov.op.Constant(ov.Tensor(packed, ov.Shape(codes.shape), kind))


class Session:
    """A compiled model with a cache that is emptied by `start`."""

    def __init__(self, task: dict[str, Any]) -> None:
        core = ov.Core()
        settings = {
            "INFERENCE_NUM_THREADS": task["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": task.get("hint", "f32"), "KV_CACHE_PRECISION": task.get("kv", "f16"),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": task.get("dynamic", 32),
        }  # fmt: skip
        model = core.read_model(task["model"])
        self.vocab = model.output("logits").get_partial_shape()[2].get_length()
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.length = 0

    def start(self, batch: int, room: int, filled: int = 0) -> None:
        """Empty caches, or `filled` random positions in them; they grow by themselves."""
        self.request.reset_state()
        self.length = 0
        if filled:
            self._fill(batch, filled)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Append ids (batch, time); logits (batch, 1, vocab) of the last position, valid until the next call."""
        batch, count = ids.shape
        positions = np.broadcast_to(np.arange(self.length, self.length + count), ids.shape)
        self._set("input_ids", ids.astype(np.int64))
        self._set("position_ids", np.ascontiguousarray(positions, np.int64))
        self._set("beam_idx", np.arange(batch, dtype=np.int32))
        self.request.infer()
        self.length += count
        return self.request.get_tensor("logits").data

    def _fill(self, batch: int, depth: int) -> None:
        self.forward(np.ones((batch, 1), np.int64))
        rng = np.random.default_rng(0)
        for state in self.request.query_state():
            shape = list(state.state.shape)
            shape[2] = depth
            state.state = ov.Tensor(rng.standard_normal(shape, F32))
        self.length = depth

    def about(self) -> dict[str, Any]:
        return {"version": ov.__version__.split("-")[0], "kernels": kernels(self.compiled)}

    def _set(self, name: str, values: np.ndarray) -> None:
        self.request.set_tensor(name, ov.Tensor(values))


def kernels(compiled: ov.CompiledModel) -> dict[str, int]:
    """What runs: how many nodes of which type and precision, for the record."""
    found: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        about = node.get_rt_info()
        kind = str(about["layerType"].astype(str)) if "layerType" in about else "?"
        if kind in {"FullyConnected", "MatMul", "ScaledDotProductAttention",
                    "RoPE", "RMS", "RMSNorm"}:  # fmt: skip
            how = about["primitiveType"].astype(str) if "primitiveType" in about else ""
            found[f"{kind} {how}".strip()] = found.get(f"{kind} {how}".strip(), 0) + 1
    return found


def build(task: dict[str, Any]) -> dict[str, Any]:
    ov.save_model(Graph(Path(task["dump"]), task.get("weights", "i4")).model(), task["model"], compress_to_fp16=False)
    return {"bytes": Path(task["model"]).with_suffix(".bin").stat().st_size}


if __name__ == "__main__":
    answer(Session, build)
