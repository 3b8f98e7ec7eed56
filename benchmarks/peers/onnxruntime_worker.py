"""ONNX Runtime runs a dump of weights (see dump.py): builds the graph, gives logits, takes times, without Trilemma.

    python onnxruntime_worker.py '{"do": "build", "dump": FOLDER, "model": "m.onnx"}'
    python onnxruntime_worker.py '{"do": "bench", "model": "m.onnx", "threads": 2, "cells": [...]}'

The graph is that of the generation package: MatMulNBits (blocks of 32, int8 inputs by accuracy level 4) and
GroupQueryAttention with rotation inside, over a cache that is written in place. The processor's MatMulNBits and
attention are f32 around the codes: scales take 4 bytes and so does each cached number. Only the last position goes
through the head. Prints one JSON object on its last line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from worker_loop import answer

F32 = np.float32
MS = "com.microsoft"


class Graph:
    """Builds the decoder of one dump; large tensors go straight to the file of external data."""

    def __init__(self, dump: Path, model: Path, accuracy: int, longest: int) -> None:
        self.dump, self.path, self.accuracy, self.longest = dump, model, accuracy, longest
        self.about = json.loads((dump / "model.json").read_text())
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.names: set[str] = set()

    def save(self) -> None:
        about = self.about
        with self.path.with_suffix(".bin").open("wb") as self.data:
            self._constants()
            x = self._embed("input_ids")
            for layer in range(about["layers"]):
                normed = self._norm(x, f"layers.{layer}.attention_norm.weight")
                x = self._node("Add", [x, self._attention(normed, layer)])
                normed = self._norm(x, f"layers.{layer}.ffn_norm.weight")
                x = self._node("Add", [x, self._ffn(normed, f"layers.{layer}.ffn")])
            last = self._node("Slice", [x, "minus_one", "far", "one"])  # (batch, 1, dim)
            self._product(self._norm(last, "final_norm.weight"), self._head(), "logits")
        onnx.save(self._whole(), self.path)

    def _whole(self) -> onnx.ModelProto:
        about = self.about
        cache = ["batch", about["kv_heads"], "past", about["head_dim"]]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "time"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total", TensorProto.INT32, []),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, about["vocab"]])]
        for layer in range(about["layers"]):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past.{layer}.{part}", TensorProto.FLOAT, cache))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", TensorProto.FLOAT, cache))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _constants(self) -> None:
        about = self.about
        self._tensor("minus_one", np.asarray([-1], np.int64))
        self._tensor("far", np.asarray([2**62], np.int64))
        self._tensor("one", np.asarray([1], np.int64))
        angles = np.outer(np.arange(self.longest), np.asarray(about["inverse_frequencies"], np.float64))
        self._tensor("cos", (np.cos(angles) * about["attention_factor"]).astype(F32))
        self._tensor("sin", (np.sin(angles) * about["attention_factor"]).astype(F32))

    def _embed(self, ids: str) -> str:
        """Rows of codes and of scales are gathered, then unpacked and multiplied."""
        bits, dim = self.about["bits"], self.about["dim"]
        codes, scales, zero = self._matrix("embedding.weight")
        rows = self._node("Gather", [codes, ids])  # (batch, time, groups, bytes)
        if bits == 4:
            self._tensor("fifteen", np.asarray(15, np.uint8))
            self._tensor("four", np.asarray(4, np.uint8))
            self._tensor("pair", np.asarray([-1], np.int64))
            low = self._node("BitwiseAnd", [rows, "fifteen"])
            high = self._node("BitShift", [rows, "four"], direction="RIGHT")
            low, high = (self._node("Unsqueeze", [each, "pair"]) for each in (low, high))
            rows = self._node("Concat", [low, high], axis=-1)
        groups = dim // self.about["group"]
        self._tensor("zero_code", np.asarray(zero, F32))
        self._tensor("in_groups", np.asarray([0, 0, groups, self.about["group"]], np.int64))
        self._tensor("flat", np.asarray([0, 0, dim], np.int64))
        rows = self._node("Reshape", [self._node("Cast", [rows], to=TensorProto.FLOAT), "in_groups"])
        rows = self._node("Sub", [rows, "zero_code"])
        scale = self._node("Unsqueeze", [self._node("Gather", [scales, ids]), "minus_one"])
        return self._node("Reshape", [self._node("Mul", [rows, scale]), "flat"])

    def _head(self) -> str:
        return "embedding.weight" if self.about["tied"] else "head.weight"

    def _matrix(self, name: str) -> tuple[str, str, int]:
        """Codes (rows, groups, bytes) with their zero point added, and f32 scales (rows, groups)."""
        bits, group = self.about["bits"], self.about["group"]
        zero = 1 << (bits - 1)
        if f"{name}.codes" not in self.names:
            codes = np.load(self.dump / f"{name}.codes.npy").view(np.uint8) + np.uint8(zero)
            if bits == 4:
                codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
            self._tensor(f"{name}.codes", codes.reshape(len(codes), -1, group * bits // 8))
            self._tensor(f"{name}.scales", np.load(self.dump / f"{name}.scales.npy").astype(F32))
        return f"{name}.codes", f"{name}.scales", zero

    def _product(self, x: str, name: str, output: str = "") -> str:
        codes, scales, _ = self._matrix(name)
        rows, columns = np.load(self.dump / f"{name}.codes.npy", mmap_mode="r").shape
        return self._node(
            "MatMulNBits", [x, codes, scales], domain=MS, output=output, K=columns, N=rows, bits=self.about["bits"],
            block_size=self.about["group"], accuracy_level=self.accuracy,
        )  # fmt: skip

    def _norm(self, x: str, name: str) -> str:
        self._tensor(name, np.load(self.dump / f"{name}.npy"))
        return self._node("SimplifiedLayerNormalization", [x, name], axis=-1, epsilon=self.about["eps"], stash_type=1)

    def _attention(self, x: str, layer: int) -> str:
        about, at = self.about, f"layers.{layer}.attention"
        parts = [self._product(x, f"{at}.{role}.weight") for role in "qkv"]
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        found = f"attention.{layer}"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention", [*parts, *past, "seqlens_k", "total", "cos", "sin"],
                [found, f"present.{layer}.key", f"present.{layer}.value"], domain=MS, num_heads=about["heads"],
                kv_num_heads=about["kv_heads"], do_rotary=1, rotary_interleaved=0, scale=about["scale"],
            )
        )  # fmt: skip
        return self._product(found, f"{at}.o.weight")

    def _ffn(self, x: str, at: str) -> str:
        gate, up = self._product(x, f"{at}.gate.weight"), self._product(x, f"{at}.up.weight")
        silu = self._node("Mul", [gate, self._node("Sigmoid", [gate])])  # the runtime fuses the pair
        return self._product(self._node("Mul", [silu, up]), f"{at}.down.weight")

    def _node(self, kind: str, inputs: Sequence[str], *, domain: str = "", output: str = "", **about: Any) -> str:
        name = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **about))
        return name

    def _tensor(self, name: str, values: np.ndarray) -> None:
        if name in self.names:
            return
        self.names.add(name)
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        raw = np.ascontiguousarray(values)
        if raw.nbytes < 1024:
            tensor.raw_data = raw.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % 4096))
            where = {"location": self.path.with_suffix(".bin").name, "offset": self.data.tell(), "length": raw.nbytes}
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            raw.tofile(self.data)
        self.tensors.append(tensor)


class Session:
    """An opened model and caches of a fixed room that are written in place."""

    def __init__(self, task: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = task["threads"]
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(task["model"], options, providers=["CPUExecutionProvider"])
        found = self.session.get_inputs()
        self.layers = (len(found) - 3) // 2
        self.kv_heads, self.size = (int(found[3].shape[axis]) for axis in (1, 3))
        self.vocab = int(self.session.get_outputs()[0].shape[2])
        self.batch = self.room = self.length = 0

    def start(self, batch: int, room: int, filled: int = 0) -> None:
        """Caches for `batch` sequences of up to `room` positions, the first `filled` of them taken by random ones."""
        if (batch, room) != (self.batch, self.room):
            self.caches: list[ort.OrtValue] = []
            rng = np.random.default_rng(0)
            for _ in range(2 * self.layers):
                values = rng.standard_normal((batch, self.kv_heads, room, self.size), F32)
                self.caches.append(ort.OrtValue.ortvalue_from_numpy(values))
            self.logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, 1, self.vocab), F32))
        self.batch, self.room, self.length = batch, room, filled

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Append ids (batch, time); logits (batch, 1, vocab) of the last position, valid until the next call."""
        self.length += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids.astype(np.int64))
        binding.bind_cpu_input("seqlens_k", np.full(self.batch, self.length - 1, np.int32))
        binding.bind_cpu_input("total", np.asarray(self.length, np.int32))
        for layer in range(self.layers):
            for index, part in enumerate(("key", "value")):
                cache = self.caches[2 * layer + index]
                binding.bind_ortvalue_input(f"past.{layer}.{part}", cache)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)
        binding.bind_ortvalue_output("logits", self.logits)
        self.session.run_with_iobinding(binding)
        return self.logits.numpy()

    def about(self) -> dict[str, Any]:
        return {"version": ort.__version__}


def build(task: dict[str, Any]) -> dict[str, Any]:
    path = Path(task["model"])
    longest = json.loads((Path(task["dump"]) / "model.json").read_text())["max_context"]
    Graph(Path(task["dump"]), path, task.get("accuracy", 4), min(longest, task.get("longest", 20000))).save()
    return {"bytes": path.with_suffix(".bin").stat().st_size}


if __name__ == "__main__":
    answer(Session, build)
