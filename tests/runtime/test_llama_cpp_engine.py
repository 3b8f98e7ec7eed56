"""The engine llama.cpp on real files: what it is given, what it keeps, where it ends. Contracts stand elsewhere.

Needs llama-cpp-python, in this environment or in that of TRILEMMA_LLAMA_CPP (the path of a Python interpreter).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile

import gguf
import numpy as np
import pytest

from trilemma.core.errors import EngineError, InputError, MissingExtraError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import load_any
from trilemma.formats.gguf.write import write_gguf
from trilemma.formats.random_weights import with_random_weights
from trilemma.measure.memory.held import peak_memory
from trilemma.model.cost import kv_bytes_per_token
from trilemma.model.model import LinearRun
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import EngineOptions, SamplingSettings, open_engine
from trilemma.runtime.llama_cpp_process import interpreter
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.technique import Build

try:
    interpreter()
except (MissingExtraError, InputError) as missing:
    pytest.skip(f"needs llama-cpp-python: {missing}", allow_module_level=True)

ONE = EngineOptions(threads=1)
SIZES = {"dim": 64, "head_dim": 32, "heads": 2, "kv_heads": 1, "ffn": 96, "vocab": 97, "context": 256}
# Largest difference of logits to the native engine, of the largest logit: same codes, inputs rounded to int8 in
# groups of 32 in both, but an input near the middle of two codes may fall to either side; caches f32.
SAME_CODES_TOLERANCE = 4e-2


def built(tiny_model, format_name="int8-g32", **sizes):
    return with_random_weights(tiny_model(**{**SIZES, **sizes}), lambda _: format_name, seed=2)


@pytest.fixture
def engine(tiny_model):
    opened = open_engine(built(tiny_model, "f32"), runtime="llama.cpp", options=ONE)
    yield opened
    opened.close()


@pytest.mark.parametrize("format_name", [
    "int8-g32", "int4-g32", "int4-g32-asym", "int8-channel", "int4-g64", "int5-g32", "int5-g32-asym", "nl4-g32",
])  # fmt: skip
def test_quantized_matrices_give_the_native_engines_logits(tiny_model, format_name):
    model = built(tiny_model, format_name)
    tokens, logits = np.arange(60) % 97, []
    for runtime in ("native", "llama.cpp"):
        opened = open_engine(model, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        logits.append(opened.logits(tokens))
        opened.close()
    assert np.abs(logits[0] - logits[1]).max() <= SAME_CODES_TOLERANCE * np.abs(logits[0]).max()


@pytest.mark.parametrize("format_name", ["int2-g16-k", "int3-g16-k", "int4-g32-k", "int5-g32-k", "int6-g16-k"])
def test_k_quants_give_the_native_engines_logits(tiny_model, format_name):
    """Inputs are rounded in groups of 256 there and of 32 here, so that both are compared with exact inputs too."""
    model = built(tiny_model, format_name, dim=256, head_dim=128, ffn=512)
    exact = model.with_tensors({}, {name: LinearRun(activation="f32") for name in model.config.product_names()})
    tokens, logits = np.arange(60) % 97, {}
    for name, one, runtime in (("exact", exact, "native"), ("ours", model, "native"), ("theirs", model, "llama.cpp")):
        opened = open_engine(one, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        logits[name] = opened.logits(tokens)
        opened.close()
    size = np.abs(logits["exact"]).max()
    ours, theirs = (np.abs(logits[name] - logits["exact"]).max() / size for name in ("ours", "theirs"))
    assert ours <= SAME_CODES_TOLERANCE
    assert theirs <= 2 * SAME_CODES_TOLERANCE


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q5_0", "Q5_1", "IQ4_NL"])
def test_a_file_that_llama_quantize_made_predicts_alike_in_both_engines(hearth_path, texts_path, tmp_path, kind):
    tool = os.environ.get("TRILEMMA_LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if tool is None:
        pytest.skip("needs llama.cpp's llama-quantize, on the path or named by TRILEMMA_LLAMA_QUANTIZE")
    model = load_any(hearth_path)
    write_gguf(model, tmp_path / "whole.gguf")
    made = tmp_path / f"{kind}.gguf"
    subprocess.run([tool, tmp_path / "whole.gguf", made, kind, "1"], check=True, capture_output=True, timeout=120)
    tokens = np.asarray(Tokenizer.load(hearth_path).encode(texts_path.read_text(encoding="utf-8")[:6000])[:1024])
    nats = []
    for runtime in ("native", "llama.cpp"):
        opened = open_engine(made, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        rows = [opened.logits(part).astype(np.float64) for part in tokens.reshape(-1, 256)]
        opened.close()
        scores = [row[:-1] - np.logaddexp.reduce(row[:-1], axis=1, keepdims=True) for row in rows]
        targets = tokens.reshape(-1, 256)[:, 1:]
        nats.append(-np.mean([s[np.arange(255), t] for s, t in zip(scores, targets, strict=True)]))
    assert abs(nats[0] - nats[1]) < 5e-3  # half a per cent of perplexity
    assert {model.format_of(name) for name in model.names()} != {load_any(made).format_of(n) for n in model.names()}


@pytest.mark.parametrize("sizes", [{"qkv_bias": True, "tied": False}, {"qk_norm": True}], ids=["qwen2", "qwen3"])
def test_other_families_agree_in_f32(tiny_model, sizes):
    model = tiny_model(**{**SIZES, **sizes})
    tokens, logits = np.arange(60) % 97, []
    for runtime in ("native", "llama.cpp"):
        opened = open_engine(model, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        logits.append(opened.logits(tokens))
        opened.close()
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5 * np.abs(logits[0]).max())


def test_a_gguf_file_is_used_as_it_is(tiny_model, tmp_path, monkeypatch):
    write_gguf(built(tiny_model), tmp_path / "model.gguf")
    monkeypatch.setattr("trilemma.formats.gguf.write.write_gguf", None)  # an export would fail
    opened = open_engine(tmp_path / "model.gguf", runtime="llama.cpp", options=ONE)
    assert opened.logits([1, 2, 3]).shape == (3, 97)
    opened.close()


def test_a_type_that_only_llama_cpp_reads_runs_there(tiny_model, tmp_path):
    model, path = tiny_model(**{**SIZES, "dim": 256, "head_dim": 128, "ffn": 512}), tmp_path / "model.gguf"
    write_gguf(model, path)
    fields = gguf.GGUFReader(path).fields
    writer = gguf.GGUFWriter(tmp_path / "iq4.gguf", "llama")
    for key, field in fields.items():
        if key.startswith("llama.") or key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:  # blocks of zeros
            blocks = np.zeros((tensor.data.shape[0], tensor.data.shape[1] // 256 * 136), np.uint8)
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="IQ4_XS"):
        open_engine(tmp_path / "iq4.gguf")
    opened = open_engine(tmp_path / "iq4.gguf", runtime="llama.cpp", options=ONE)
    assert np.isfinite(opened.logits([1, 2, 3])).all()
    opened.close()


def test_no_exported_file_is_left_behind(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = open_engine(built(tiny_model), runtime="llama.cpp", options=ONE)
    assert not list(tmp_path.iterdir())
    opened.logits([1, 2])
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened.logits([1])


def test_a_structure_that_gguf_can_not_say_is_refused_by_name(tiny_model, experts_config, random_model):
    with pytest.raises(UnsupportedModelError, match="experts"):
        open_engine(random_model(experts_config()), runtime="llama.cpp")
    model = tiny_model(qkv_bias=True, dim=40, heads=5, kv_heads=1, head_dim=12)
    with pytest.raises(UnsupportedModelError, match="width of 40 in qwen2"):
        open_engine(model, runtime="llama.cpp")


def test_a_damaged_file_is_refused_with_llama_cpps_reason(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(built(tiny_model), path)
    raw = path.read_bytes()
    key = b"llama.attention.layer_norm_rms_epsilon"
    path.write_bytes(raw.replace(key, key[:-1] + b"X"))  # we have a default for it, llama.cpp has none
    with pytest.raises(EngineError, match=r"can not load the file.*layer_norm_rms_epsilon"):
        open_engine(path, runtime="llama.cpp", options=ONE)


@pytest.mark.parametrize(
    ("asked", "kept"), [(None, "f16"), ("f32", "f32"), ("bf16", "bf16"), ("int8", "q8_0"), ("int4", "q4_0")]
)
def test_the_cache_is_what_it_says(tiny_model, asked, kept):
    options = EngineOptions(threads=1, kv_cache=asked)
    opened = open_engine(built(tiny_model), runtime="llama.cpp", options=options)
    positions = 2 * 2 * 256  # keys and values of two layers
    size = {"f16": 2, "bf16": 2, "f32": 4, "q8_0": 34 / 32, "q4_0": 18 / 32}[kept]
    assert opened.kv_cache == kept
    assert kv_bytes_per_token(opened.config, kept) == 2 * 2 * 32 * size
    assert opened.memory().kv_bytes == pytest.approx(positions * 32 * size, abs=6000)  # reported in hundredths of MiB
    opened.close()


def test_options_that_llama_cpp_lacks_are_refused(tiny_model):
    for options, why in (
        (EngineOptions(kv_cache="none"), "always keeps a cache"),
        (EngineOptions(isa="avx2"), "chosen its instruction set"),
        (EngineOptions(max_context=257), "1 to 256"),
    ):
        with pytest.raises(InputError, match=why):
            open_engine(built(tiny_model), runtime="llama.cpp", options=options)
    with pytest.raises(InputError, match="multiple of 32"):
        open_engine(tiny_model(), runtime="llama.cpp", options=EngineOptions(kv_cache="int8"))


def test_it_ends_where_the_context_ends(engine):
    done = engine.generate([1] * 250, SamplingSettings(max_tokens=50, ignore_eos=True))
    assert (len(done.tokens), done.finish_reason) == (6, "context")


def test_an_error_in_a_callback_leaves_it_ready(engine):
    def fail(token: int) -> None:
        raise ValueError("not this one")

    settings = SamplingSettings(max_tokens=5, ignore_eos=True)
    wanted = engine.generate([1, 2], settings).tokens
    with pytest.raises(ValueError, match="not this one"):
        engine.generate([1, 2], settings, fail)
    assert engine.generate([1, 2], settings).tokens == wanted


def test_drawing_with_top_k_of_one_is_greedy(engine):
    greedy = engine.generate([3, 4], SamplingSettings(max_tokens=8, ignore_eos=True))
    drawn = engine.generate([3, 4], SamplingSettings(max_tokens=8, ignore_eos=True, temperature=0.7, top_k=1))
    assert drawn.tokens == greedy.tokens
    assert len(drawn.token_times_s) == 8


def test_a_killed_process_is_an_error_with_its_signal(engine):
    os.kill(engine._worker._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"signal 9.*memory"):
        engine.logits([1, 2])


def test_memory_is_counted_by_llama_cpp(tiny_model):
    model = built(tiny_model, "f32")
    opened = open_engine(model, runtime="llama.cpp", options=ONE)
    held = opened.memory()
    assert held.weights_bytes == 4 * sum(int(np.prod(shape)) for shape in model.config.tensor_shapes().values())
    assert held.scratch_bytes > 0
    assert "llama_model_size" in opened.memory_method
    assert opened.peak_resident_bytes() > held.weights_bytes
    opened.close()


def test_the_peak_is_that_of_llama_cpps_process(hearth_path):
    found = peak_memory(hearth_path, prompt_tokens=16, output_tokens=4, runtime="llama.cpp", options=ONE)
    assert found.value is not None
    assert 20e6 < found.value < 400e6
    assert max(value for value in found.conditions.values() if isinstance(value, float | int)) < found.value


def test_the_shipped_model_says_the_same_in_f32(hearth_path):
    recipe = Recipe(name="f32", steps=(Step(technique="plain", settings={"dtype": "f32"}),))
    model = apply_recipe(load_any(hearth_path), recipe, Build())
    answers = []
    for runtime in ("native", "llama.cpp"):
        opened = open_engine(model, runtime=runtime, options=EngineOptions(threads=1, kv_cache="f32"))
        answers.append(opened.generate([0, 500, 320, 11], SamplingSettings(max_tokens=40, ignore_eos=True)).tokens)
        opened.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("format_name", ["bf16", "int8-g32"])
def test_one_file_has_the_same_perplexity_in_both(hearth_path, texts_path, tmp_path, format_name):
    """Within 0.5% by llama.cpp's protocol; against the reference in f32, which is the native engine's in both."""
    from trilemma.measure.quality.evaluate import evaluate

    source = load_any(hearth_path)
    step = Step(technique="plain", settings={"dtype": "bf16"})
    if format_name != "bf16":
        settings = {"weights": format_name, "embedding": format_name, "head": format_name}
        step = Step(technique="rtn", settings=settings)
    write_gguf(apply_recipe(source, Recipe(name=format_name, steps=(step,)), Build()), tmp_path / "model.gguf")
    text = tmp_path / "text.txt"
    text.write_text(texts_path.read_text(encoding="utf-8")[:30_000].replace("<|endoftext|>", "\n"), encoding="utf-8")
    found = {
        runtime: evaluate(
            tmp_path / "model.gguf", text, reference=source, context=128, max_tokens=1024, protocol="llama.cpp",
            runtime=runtime, options=ONE,
        ).rows[0].measurements
        for runtime in ("native", "llama.cpp")
    }  # fmt: skip
    ours, theirs = (found[name]["perplexity"].value for name in ("native", "llama.cpp"))
    assert theirs == pytest.approx(ours, rel=5e-3)
    references = {item["ppl_increase"].conditions["reference_perplexity"] for item in found.values()}
    assert len(references) == 1
    assert found["llama.cpp"]["kl_mean"].value < 2e-3
