"""The engine that defines what is right: torch, f32 arithmetic on dequantized weights, no tricks.

It honours a model's activation modes and KV precision by rounding exactly where the native engine
does (inputs of a matrix product per 32 columns, with scales of their own or powers of two of their
row's; keys and values per position and head), so that the two can be compared format by format. It
is neither small nor fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trilemma.core.environment import usable_cores
from trilemma.core.errors import InputError
from trilemma.formats import FORMATS, Format
from trilemma.model.config import Attention
from trilemma.model.decoder import Decoder, KvSlot
from trilemma.model.model import Activation, Model
from trilemma.runtime.engine import EngineMemory, EngineOptions, Generation, SamplingSettings
from trilemma.runtime.requests import checked_tokens
from trilemma.runtime.sampling import check_sampling, choose

ACTIVATION_GROUP = 32
FinishReason = Literal["length", "stop", "context", "interrupted"]


class ReferenceEngine:
    """The Engine protocol on the torch decoder.

    Args:
        model: any formats; matrices are dequantized to f32 once.
        options: `isa` has no meaning here and must be None.

    Raises:
        InputError: more context than the model's, or an instruction set asked for.
    """

    name = "torch"
    isa = "torch"
    dtype = torch.float32

    def __init__(self, model: Model, options: EngineOptions | None = None) -> None:
        options = options or EngineOptions()
        if options.isa is not None:
            raise InputError(f"The torch engine has no instruction set to choose; got isa '{options.isa}'.")
        self.config = model.config
        self.max_context = options.max_context or model.config.max_context
        if self.max_context > model.config.max_context:
            raise InputError(
                f"A context of {self.max_context} is longer than the model's {model.config.max_context}. "
                "Ask for less, or choose a model that was trained for more."
            )
        self.threads = options.threads or usable_cores()
        self.kv_cache: str = options.kv_cache or model.run.kv_cache
        self._decoder = Decoder.from_model(model, self.dtype).eval().requires_grad_(False)
        _round_inputs(self._decoder, model)

    def memory(self) -> EngineMemory:
        """Bytes held: weights and, for a full context, keys and values (rounded, but stored in the wide dtype)."""
        weights = sum(parameter.nbytes for parameter in self._decoder.parameters())
        specs = [layer.attention for layer in self.config.layers if layer.attention is not None]
        kv = (
            0
            if self.kv_cache == "none"
            else sum(2 * spec.kv_heads * spec.head_dim for spec in specs) * self.dtype.itemsize
        )
        return EngineMemory(weights, kv * self.max_context, 4 * self.config.vocab_size)

    def logits(self, tokens: NDArray[np.int32] | Sequence[int], *, last_only: bool = False) -> NDArray[np.float32]:
        """Logits (n, vocab), or (1, vocab) with `last_only`, of a fresh sequence."""
        ids = self._checked(tokens)
        with self._running():
            return self._forward(ids, 0, self._slots(len(ids)), last_only).numpy()

    def generate(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> Generation:
        """Continue `prompt`; a stop token ends the output and is not part of it."""
        check_sampling(settings)
        ids = self._checked(prompt)
        if len(ids) >= self.max_context:
            raise InputError(f"The prompt's {len(ids)} tokens fill the context of {self.max_context}; shorten it.")
        stops = set(settings.stop_token_ids) | (set() if settings.ignore_eos else set(self.config.eos_token_ids))
        result = Generation(tokens=[], finish_reason="length", prompt_tokens=len(ids))
        with self._running():
            reason = self._loop(ids, settings, stops, on_token, result)
        return Generation(result.tokens, reason, result.prompt_tokens, result.token_times_s)

    def close(self) -> None:
        """Free the weights; the engine can not be asked afterwards."""
        self._decoder = Decoder(self.config.model_copy(update={"layers": (), "vocab_size": 1, "dim": 1}))

    def _loop(
        self,
        ids: list[int],
        settings: SamplingSettings,
        stops: set[int],
        on_token: Callable[[int], bool | None] | None,
        result: Generation,
    ) -> FinishReason:
        begun = time.perf_counter()
        room = min(self.max_context, len(ids) + settings.max_tokens)
        slots = self._slots(room)
        seen, fed = list(ids), 0
        while True:
            start = fed if slots is not None else 0  # without a cache everything is computed again
            logits = self._forward(seen[start:], start, slots, True)
            fed = len(seen)
            token = choose(logits[-1].numpy(), seen, settings)
            if token in stops:
                return "stop"
            seen.append(token)
            result.tokens.append(token)
            result.token_times_s.append(time.perf_counter() - begun)
            if on_token is not None and on_token(token) is False:
                return "interrupted"
            if len(result.tokens) >= settings.max_tokens:
                return "length"
            if len(seen) >= self.max_context:
                return "context"

    def _forward(self, ids: list[int], start: int, slots: list[KvSlot] | None, last_only: bool) -> Tensor:
        """(time, vocab), or (1, vocab) with `last_only`."""
        with torch.inference_mode():
            out: Tensor = self._decoder(torch.tensor([ids]), start=start, slots=slots, last_only=last_only)[0]
            return out.float()

    def _slots(self, capacity: int) -> list[KvSlot] | None:
        """One cache a layer; None where nothing is rounded or kept."""
        if self.kv_cache == "none":
            return None
        return [_Slot(layer.attention, capacity, self.kv_cache, self.dtype) for layer in self.config.layers]

    def _checked(self, tokens: NDArray[np.int32] | Sequence[int]) -> list[int]:
        return [int(token) for token in checked_tokens(tokens, self.config.vocab_size, self.max_context)]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """torch's thread count is the process's: borrowed while we run."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class F16ReferenceEngine(ReferenceEngine):
    """The same with every operation in f16: shows what overflows beyond 65,504 or is lost below 6e-8.

    Norms, rotary angles and softmax sums are f32 inside, as in the f16 kernels of other runtimes.
    """

    name = "torch-f16"
    isa = "torch-f16"
    dtype = torch.float16


class Bf16ReferenceEngine(ReferenceEngine):
    """The same with every operation in bf16: the range of f32, 8 bits of precision."""

    name = "torch-bf16"
    isa = "torch-bf16"
    dtype = torch.bfloat16


class _Slot:
    """Keys and values of one layer and one sequence, rounded as the policy says, held in f32."""

    def __init__(self, spec: Attention | None, capacity: int, policy: str, dtype: torch.dtype) -> None:
        heads, dim = (spec.kv_heads, spec.head_dim) if spec else (0, 0)
        self._keys = torch.empty(1, heads, capacity, dim, dtype=dtype)
        self._values = torch.empty(1, heads, capacity, dim, dtype=dtype)
        self._length = 0
        self._round = KV_ROUNDING[policy]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self._length + keys.shape[2]
        self._keys[:, :, self._length : end] = self._round(keys)
        self._values[:, :, self._length : end] = self._round(values)
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def round_bf16(x: Tensor) -> Tensor:
    """The nearest bf16 values, in the dtype of x."""
    return x.to(torch.bfloat16).to(x.dtype)


def round_int8(x: Tensor) -> Tensor:
    """Symmetric int8 along the last dimension: scale absmax / 127, codes rounded half to even."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return torch.round(x * inverse).clamp(-127, 127) * scale


def round_int4_mixed(x: Tensor) -> Tensor:
    """4-bit codes with a scale and a minimum in bf16 along the last dimension, of its Hadamard transform.

    Dimensions are mixed in blocks of the largest power of two that divides their number. Half to even.
    """
    block = x.shape[-1] & -x.shape[-1]
    signs = torch.ones(1, 1, dtype=x.dtype)
    while len(signs) < block:
        signs = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=x.dtype), signs)

    def mix(values: Tensor) -> Tensor:
        return (values.reshape(*values.shape[:-1], -1, block) @ signs).reshape(values.shape)

    mixed = mix(x)
    low = mixed.amin(-1, keepdim=True)
    scale = round_bf16((mixed.amax(-1, keepdim=True) - low) / 15)
    low = round_bf16(low)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    kept = torch.round((mixed - low) * inverse).clamp(0, 15) * scale + low
    return mix(kept) / block


def round_int8_groups(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """`round_int8` in groups of columns; the last group is short where `group` does not divide them."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % group))
    return round_int8(padded.reshape(*x.shape[:-1], -1, group)).flatten(-2)[..., :columns]


def round_int8_shared(x: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """Symmetric int8 with one scale a row, absmax / 127, and 2^-e of it for each group of columns; half to even.

    e is the largest, up to 30, that leaves the group within 127 codes.
    """
    columns = x.shape[-1]
    groups = nn.functional.pad(x, (0, -columns % group)).reshape(*x.shape[:-1], -1, group)
    peak = groups.abs().amax(-1, keepdim=True)
    row = peak.amax(-2, keepdim=True)
    row_scale = row / 127
    shift = torch.zeros_like(peak)
    for e in range(1, 31):
        shift += peak * 2.0**e <= row
    scale = torch.exp2(-shift)
    inverse = torch.where(row_scale > 0, 1 / row_scale, torch.zeros_like(row_scale)) / scale
    return (torch.round(groups * inverse).clamp(-127, 127) * scale * row_scale).flatten(-2)[..., :columns]


KV_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda x: x, "bf16": round_bf16, "int8": round_int8, "int4": round_int4_mixed,
}  # fmt: skip
ACTIVATION_ROUNDING: dict[Activation, Callable[[Tensor], Tensor]] = {
    "f32": lambda x: x,
    "bf16": round_bf16,
    "int8-g32": round_int8_groups,
}


def _round_inputs(decoder: Decoder, model: Model) -> None:
    """Hook each matrix product whose LinearRun asks for rounded inputs. A tied head goes by 'embedding.weight'."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            rounding = input_rounding(model, f"{name}.weight")
            module.register_forward_pre_hook(lambda _module, inputs, rounding=rounding: (rounding(inputs[0]),))
    if decoder.head is None:
        # the final norm's only reader is then the head
        rounding = input_rounding(model, "embedding.weight")
        decoder.final_norm.register_forward_hook(lambda _module, _inputs, output, rounding=rounding: rounding(output))


def input_rounding(model: Model, name: str) -> Callable[[Tensor], Tensor]:
    """What the products with that matrix do to their inputs (..., in)."""
    return rounding_for(FORMATS.get(model.format_of(name)), model.linear(name).activation)


def rounding_for(spec: Format, activation: Activation) -> Callable[[Tensor], Tensor]:
    """What products with a matrix of this format do to their inputs (..., in)."""
    if activation == "int8-g32" and spec.shares_input_scale:
        return round_int8_shared
    return ACTIVATION_ROUNDING[activation]
