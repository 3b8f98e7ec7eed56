"""Stub of the C++ extension (native/bindings.cpp). Use `trilemma.runtime.native`, which checks and explains."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class NativeError(ValueError): ...

def supported_isas() -> list[str]: ...
def time_products(
    model: Model, jobs: Sequence[Sequence[str]], *, tokens: int, threads: int, isa: str = "", passes: int = 1
) -> list[float]: ...
def crc32(data: NDArray[np.uint8]) -> int: ...
def release_free_memory() -> None: ...
def plan_memory(
    config: Mapping[str, Any],
    products: Sequence[tuple[str, int, bool, int, bool]],
    *,
    isa: str,
    kv_cache: str,
    max_context: int,
    max_sequences: int = 1,
    kv_positions: int = 0,
) -> tuple[int, int]: ...

class Model:
    def __init__(self, config: Mapping[str, Any]) -> None: ...
    def add_plain(
        self, name: str, dtype: str, rows: int, cols: int, data: NDArray[np.uint8], activation: str = "f32"
    ) -> None: ...
    def add_packed(
        self,
        name: str,
        bits: int,
        symmetric: bool,
        group: int,
        rows: int,
        cols: int,
        activation: str,
        codes: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        minima: NDArray[np.uint8] | None = None,
        sub_group: int = 0,
        sub_scales: NDArray[np.uint8] | None = None,
        sub_minima: NDArray[np.uint8] | None = None,
        codebook: bool = False,
    ) -> None: ...
    def add_vector(self, name: str, values: NDArray[np.float32]) -> None: ...
    def finalize(self) -> None: ...
    def settle(self, threads: int) -> None: ...
    @property
    def weights_bytes(self) -> int: ...

class Loader:
    def __init__(self, model: Model, *, map: bool, verify: bool) -> None: ...
    def add_file(self, path: str, bytes: int) -> int: ...
    def add_panels(
        self,
        name: str,
        bits: int,
        symmetric: bool,
        group: int,
        sub_group: int,
        rows: int,
        cols: int,
        activation: str,
        file: int,
        pieces: Sequence[tuple[int, int, int]],
        codebook: bool = False,
    ) -> None: ...
    def add_rows(
        self,
        name: str,
        label: str,
        dtype: str,
        rows: int,
        cols: int,
        activation: str,
        file: int,
        piece: tuple[int, int, int],
        order: Sequence[int],
    ) -> None: ...
    def add_blocks(
        self,
        name: str,
        label: str,
        type: str,
        rows: int,
        cols: int,
        activation: str,
        file: int,
        piece: tuple[int, int, int],
        order: Sequence[int],
    ) -> None: ...
    def run(self, threads: int) -> None: ...

class Context:
    def __init__(
        self,
        model: Model,
        *,
        threads: int,
        isa: str,
        kv_cache: str,
        max_context: int,
        max_sequences: int = 1,
        chunk: int = 0,
        kv_positions: int = 0,
        share_prefixes: bool = False,
    ) -> None: ...
    def forward(self, steps: Sequence[tuple[int, NDArray[np.int32], str]]) -> NDArray[np.float32]: ...
    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        stop_tokens: Sequence[int],
        on_token: Callable[[int], bool | None] | None = None,
    ) -> tuple[list[int], list[float], str, int]: ...
    def create(self) -> int: ...
    def begin(self, tokens: NDArray[np.int32]) -> tuple[int, int]: ...
    def fork(self, sequence: int) -> int: ...
    def truncate(self, sequence: int, length: int) -> None: ...
    def release(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def save(self, sequence: int) -> bytes: ...
    def restore(self, saved: bytes) -> int: ...
    def pages(self) -> tuple[int, int, int]: ...
    def memory(self) -> tuple[int, int, int]: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def max_context(self) -> int: ...
