"""Weights read by the engine itself: the same bits as tensors handed over one by one, and every damage an error."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from trilemma import _native
from trilemma.core.errors import CheckpointError, InputError
from trilemma.core.recipe import Recipe
from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any, read_artifact, write_artifact
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.checkpoint import write_checkpoint
from trilemma.model.gguf import gguf_name
from trilemma.model.model import Model
from trilemma.model.sources import MemorySource
from trilemma.runtime import EngineOptions, SamplingSettings
from trilemma.runtime.engine import settle
from trilemma.runtime.native import NativeEngine, Step

RECIPE = Recipe(name="any", steps=())
TYPES = {"F32": 0, "F16": 0, "BF16": 0, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144,
         "Q5_K": 176, "Q6_K": 210, "Q2_K": 84, "Q3_K": 110, "IQ4_NL": 18}  # fmt: skip
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
          "Q2_K": (80, 82), "Q3_K": (108,)}  # fmt: skip


def one_by_one(model: Model) -> Model:
    """The same tensors from memory, which the engine can not read by itself."""
    return Model(
        model.config, MemorySource({name: model.stored(name) for name in model}), linears=model.linears, run=model.run
    )


def logits_of(model: Model, **options: object) -> bytes:
    engine = NativeEngine(model, EngineOptions(**{"threads": 1, **options}))  # type: ignore[arg-type]
    return engine.logits(np.arange(19) % model.config.vocab_size).tobytes()


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, bytes) of random codes and factors, with scales that keep activations in range."""
    values = 0.05 * rng.standard_normal((rows, columns)).astype(np.float32)
    if not TYPES[kind]:
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    per_block = 256 if kind.endswith("_K") else 32
    blocks = rng.integers(0, 256, (rows, columns // per_block, TYPES[kind]), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        scales = rng.uniform(-0.01, 0.01, blocks.shape[:2]).astype(np.float16) / np.float16(per_block // 32)
        blocks[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_blocks(path: Path, config, kind: str, rng: np.random.Generator) -> Path:
    writer, spec = gguf.GGUFWriter(path, "llama"), config.layers[0].attention
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(len(config.layers))
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
        else:
            blocks = random_blocks(kind, *shape, rng)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_a_gguf_file_become_the_same_panels_as_in_numpy(
    tiny_model, tmp_path, kind, threads, random_generator
):
    # 97 rows of the embedding and 3 heads of 8 leave panels that are not full; rows of q and k change their order.
    sizes = {"dim": 96, "ffn": 160, "heads": 12, "kv_heads": 3, "head_dim": 8}
    if kind.endswith("_K"):
        sizes = {"dim": 256, "ffn": 512, "heads": 8, "kv_heads": 4, "head_dim": 32}
    config = tiny_model(**sizes, tied=False).config
    model = load_any(write_blocks(tmp_path / "model.gguf", config, kind, random_generator))
    assert logits_of(model, threads=threads) == logits_of(one_by_one(model))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_rows_of_a_checkpoint_are_the_same(tiny_model, tmp_path, dtype):
    write_checkpoint(tiny_model(seed=5, tied=False, ffn=81), tmp_path / "model", dtype=dtype)
    model = load_any(tmp_path / "model")
    assert all(model.locate(name) for name in model if len(model.config.tensor_shapes()[name]) == 2)
    assert logits_of(model, threads=2) == logits_of(one_by_one(model))


@pytest.fixture
def mixed(tiny_model, tmp_path) -> Path:
    """An artifact that has every format."""
    names = FORMATS.names()
    model = tiny_model(tied=False, dim=40, head_dim=10, ffn=172, layers=6)
    order = {name: index for index, name in enumerate(model.names())}
    made = with_random_weights(model, lambda name: names[order[name] % len(names)], seed=3)
    write_artifact(made, tmp_path / "mixed", RECIPE)
    return tmp_path / "mixed"


@pytest.mark.parametrize("load", ["copy", "map"])
@pytest.mark.parametrize("verify", [None, True, False])
def test_an_artifact_is_the_same_however_it_is_loaded(mixed, load, verify):
    model = read_artifact(mixed)
    assert logits_of(model, load=load, verify=verify, threads=2) == logits_of(one_by_one(model))


def test_memory_is_told_alike_however_it_is_loaded(mixed):
    engines = [NativeEngine(read_artifact(mixed), EngineOptions(threads=1, load=load)) for load in ("copy", "map")]
    assert engines[0].memory() == engines[1].memory()


def test_a_mapped_model_outlives_its_folder(mixed):
    engine = NativeEngine(read_artifact(mixed), EngineOptions(threads=1, load="map"))
    before = engine.logits([1, 2, 3])
    shutil.rmtree(mixed)
    np.testing.assert_array_equal(engine.logits([1, 2, 3]), before)


def damage(folder: Path, name: str) -> None:
    """Flip a bit in the middle of a matrix."""
    piece = next(iter(read_artifact(folder).locate(name).pieces.values()))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[piece.offset + piece.nbytes // 2] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


@pytest.mark.parametrize("name", ["layers.1.ffn.up.weight", "layers.0.attention.q.weight", "head.weight"])
def test_a_flipped_bit_is_found_when_copied_and_on_request_when_mapped(mixed, name):
    damage(mixed, name)
    for options in ({}, {"load": "map", "verify": True}):
        with pytest.raises(CheckpointError, match=f"'{name}'.*checksum"):
            logits_of(read_artifact(mixed), **options)
    logits_of(read_artifact(mixed), verify=False)


def test_artifacts_without_crc32_are_read_and_checked_as_before(mixed):
    record = json.loads((mixed / "trilemma.json").read_text())
    record["schema_version"] = 1
    for tensor in record["tensors"].values():
        del tensor["crc32"]
    before = logits_of(read_artifact(mixed))
    damaged = mixed.with_name("damaged")
    shutil.copytree(mixed, damaged)
    damage(damaged, "head.weight")
    for folder in (mixed, damaged):
        (folder / "trilemma.json").write_text(json.dumps(record))
    assert logits_of(read_artifact(mixed)) == before
    with pytest.raises(CheckpointError, match="checksum"):
        logits_of(read_artifact(damaged))


@pytest.mark.parametrize("load", ["copy", "map"])
@pytest.mark.parametrize("change", [-1, -5000, 64])
def test_a_file_that_changes_its_size_after_the_header_was_read_is_an_error(mixed, load, change):
    model = read_artifact(mixed)
    path = mixed / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(CheckpointError, match="bytes"):
        logits_of(model, load=load)


def test_values_that_are_not_finite_are_refused_with_their_place(tiny_model, tmp_path):
    model = tiny_model(seed=1)
    values = model.tensor("layers.1.ffn.down.weight").copy()
    values[31, 7] = np.inf
    write_checkpoint(model.with_tensors({"layers.1.ffn.down.weight": values}), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight.*\(31, 7\)"):
        logits_of(load_any(tmp_path / "model"))


def test_blocks_with_a_scale_that_is_not_finite_are_refused(tiny_model, tmp_path, random_generator):
    config = tiny_model(dim=64, ffn=96, head_dim=16).config
    model = load_any(write_blocks(tmp_path / "model.gguf", config, "Q4_0", random_generator))
    piece = model.locate("layers.1.ffn.up.weight").pieces["values"]
    raw = bytearray((tmp_path / "model.gguf").read_bytes())
    raw[piece.offset + 36 * 50 : piece.offset + 36 * 50 + 2] = np.float16("nan").tobytes()
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight.*row 50"):
        logits_of(load_any(tmp_path / "model.gguf"))


@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 63, 64, 65, 79, 80, 127, 1000, 4096, 100_003])
def test_the_checksum_is_zlibs(size, random_generator):
    data = random_generator.integers(0, 256, size, dtype=np.uint8)
    assert _native.crc32(data) == zlib.crc32(data)


def test_a_saved_cache_knows_its_weights_however_they_were_loaded(tiny_model, tmp_path):
    folders = []
    for seed in (1, 2):
        model = with_random_weights(tiny_model(), lambda _: "int4-g32", seed=seed)
        folders.append(tmp_path / str(seed))
        write_artifact(model, folders[-1], RECIPE)

    def batch_of(folder: Path, load: str):
        engine = NativeEngine(read_artifact(folder), EngineOptions(threads=1, load=load))  # type: ignore[arg-type]
        return engine.open_sequences(1)

    copied = batch_of(folders[0], "copy")
    sequence = copied.create()
    copied.forward([Step(sequence, [1, 2, 3])])
    saved = copied.save(sequence)
    assert batch_of(folders[0], "map").restore(saved) == 0
    for load in ("copy", "map"):
        with pytest.raises(InputError):
            batch_of(folders[1], load).restore(saved)


def huge_kb() -> int:
    """Memory of this process on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def test_weights_move_to_huge_pages_when_they_have_been_in_use(tiny_model):
    """24 MB in f32: some hundred tokens on, and at once where they are told to settle; the answers are the same."""
    model = tiny_model(seed=5, vocab=60000, dim=96, context=512)
    prompt, settings = [3, 1, 4], SamplingSettings(max_tokens=250, ignore_eos=True)
    answers, moved = [], []
    for told in (False, True):
        engine = NativeEngine(model, EngineOptions(threads=2))
        before = huge_kb()
        if told:
            settle(engine)
        settled = huge_kb()
        answers.append(engine.generate(prompt, settings).tokens)
        np.testing.assert_array_equal(
            engine.logits(prompt), NativeEngine(model, EngineOptions(threads=1)).logits(prompt)
        )
        moved.append((settled - before, huge_kb() - before))
        engine.close()
    assert answers[0] == answers[1]
    if max(late for _, late in moved) == 0:
        pytest.skip("this system moves no filled pages to huge ones (Linux 6.1 does)")
    assert moved[0][0] == 0
    assert moved[0][1] > 10_000
    assert moved[1][0] > 10_000
