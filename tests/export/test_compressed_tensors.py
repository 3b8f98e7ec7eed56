"""compressed-tensors folders: every code and scale by hand, and loaded by transformers, whose logits decide."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from family_cases import CASES
from trilemma.api import export_model
from trilemma.core.errors import OutputError, RecipeError, UnsupportedModelError
from trilemma.core.recipe import Recipe, Step
from trilemma.export.compressed_tensors import export_compressed_tensors
from trilemma.formats import FORMATS
from trilemma.formats.artifact import load_any
from trilemma.formats.compressed_tensors import pack_int32
from trilemma.formats.random_weights import with_random_weights
from trilemma.model.checkpoint import write_checkpoint
from trilemma.model.safetensors import SafetensorsFile
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.schemes import scheme_to_recipe

WIDE = {"dim": 128, "head_dim": 32, "heads": 4, "kv_heads": 2, "ffn": 256, "vocab": 97}
FITTING = [name for name, spec in ((name, FORMATS.get(name)) for name in FORMATS)
           if not spec.floating and spec.symmetric and spec.supergroup is None and spec.values is None
           and spec.group in (None, 32, 64, 128)]  # fmt: skip
OTHERS = [name for name in FORMATS if name not in FITTING and not FORMATS.get(name).floating]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "I32": np.int32, "I64": np.int64}
NEEDED = (
    "loading the export needs the packages compressed-tensors, transformers and torch: pip install 'trilemma[test]'"
)


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {
        name: file.read_bytes(name).view(DTYPES[entry.dtype]).reshape(entry.shape)
        for name, entry in file.entries.items()
    }
    return json.loads((folder / "config.json").read_text()), tensors


def module_of(name: str) -> str:
    """A canonical Llama name to the module of its Hugging Face class, written from that class."""
    _, layer, block, role, _ = name.split(".")
    inner = {"attention": f"self_attn.{role}_proj", "ffn": f"mlp.{role}_proj"}[block]
    return f"model.layers.{layer}.{inner}"


def decoded(tensors: dict[str, np.ndarray], module: str, scheme: dict) -> np.ndarray:
    """f32 values as the format's description says, a value at a time."""
    scales = tensors[f"{module}.weight_scale"].astype(np.float32)
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"].astype(np.float32) * scales
    words = tensors[f"{module}.weight_packed"].view(np.uint32)
    rows, columns = tensors[f"{module}.weight_shape"]
    bits = scheme["num_bits"]
    codes = np.empty((rows, columns), np.float32)
    for column in range(columns):
        word, place = divmod(column, 32 // bits)
        codes[:, column] = (words[:, word] >> np.uint32(bits * place)) & np.uint32(2**bits - 1)
    group = scheme.get("group_size") or columns
    return (codes - np.float32(2 ** (bits - 1))) * np.repeat(scales, group, axis=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_words_are_packed_from_the_lowest_bits(bits, columns, random_generator):
    codes = random_generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns)).astype(np.int8)
    packed = pack_int32(codes, bits)
    for row in range(3):
        whole = sum((int(code) + 2 ** (bits - 1)) << (bits * at) for at, code in enumerate(codes[row]))
        words = [(whole >> (32 * at)) & 0xFFFFFFFF for at in range(packed.shape[1])]
        assert packed[row].view(np.uint32).tolist() == words
        assert whole >> (32 * packed.shape[1]) == 0


@pytest.mark.parametrize("name", FITTING)
def test_every_symmetric_format_goes_out_bit_for_bit(name, tiny_model, tmp_path):
    model = with_random_weights(tiny_model(**WIDE, tied=False), lambda _: name, seed=7)
    report = export_compressed_tensors(model, tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    told = config["quantization_config"]
    assert told["config_groups"].keys() == {"group_0"}
    group = told["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert told["ignore"] == ["lm_head"]
    assert group["weights"].get("group_size") == FORMATS.get(name).group
    assert group["weights"]["num_bits"] == (4 if FORMATS.get(name).bits <= 4 else 8)
    for tensor in model.config.linear_names():
        if tensor.startswith("layers."):
            values = decoded(tensors, module_of(tensor), group["weights"])
            np.testing.assert_array_equal(values, model.tensor(tensor), err_msg=tensor)
    for stored, tensor in (("lm_head.weight", "head.weight"), ("model.embed_tokens.weight", "embedding.weight")):
        np.testing.assert_array_equal(tensors[stored], model.tensor(tensor).astype(np.float16))
    assert not report.lossless  # the embedding is rounded to 16 bits, and that is said
    assert sum("embedding.weight is kept in f16" in note for note in report.notes) == 1
    assert report.tensor_bytes == sum(values.nbytes for values in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_refused_or_requantized_with_its_loss(name, tiny_model, tmp_path):
    wide = {**WIDE, "dim": 256, "head_dim": 64}
    model = with_random_weights(tiny_model(**wide), lambda _: name, seed=3)
    with pytest.raises(RecipeError, match=rf"'layers\.0\.attention\.q\.weight'.*'{name}'.*requantize"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export_compressed_tensors(model, tmp_path / "out", requantize=True)
    config, tensors = read(tmp_path / "out")
    scheme = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    errors = []
    for tensor in model.config.linear_names():
        wanted = model.tensor(tensor)
        values = decoded(tensors, module_of(tensor), scheme)
        errors.append(np.linalg.norm(values - wanted) / np.linalg.norm(wanted))
    assert max(errors) < 0.01
    assert f"relative error at most {max(errors):.2%}" in report.notes[0]
    assert not report.lossless


def mixed(model):
    """4 bits, 8 bits a row with int8 inputs, 8 bits in groups, and one matrix left alone."""
    overrides = {
        "layers.0.attention.q.weight": "bf16", "layers.1.ffn.down.weight": "int8-channel",
        "layers.0.ffn.up.weight": "int8-g32", "layers.0.ffn.gate.weight": "int8-g32",
    }  # fmt: skip
    settings = {"weights": "int4-g32", "embedding": "bf16", "activations": "int8-g32", "overrides": overrides}
    return apply_recipe(model, Recipe(steps=(Step(technique="rtn", settings=settings),)), Build())


def test_layers_in_several_formats_are_named(tiny_model, tmp_path):
    model = mixed(tiny_model(**WIDE))
    report = export_compressed_tensors(model, tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    told = config["quantization_config"]
    assert told["format"] == "mixed-precision"
    assert told["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    targets = {group["weights"]["num_bits"] * 1000 + group["weights"].get("group_size", 0): group
               for group in told["config_groups"].values()}  # fmt: skip
    assert targets[8000]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert targets[8000]["input_activations"]["strategy"] == "token"
    assert targets[8032]["targets"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert targets[4032]["input_activations"] is None
    assert len(targets[4032]["targets"]) == 10
    for group in targets.values():
        for module in group["targets"]:
            name = next(name for name in model.config.linear_names()
                        if name.startswith("layers.") and module_of(name) == module)  # fmt: skip
            np.testing.assert_array_equal(decoded(tensors, module, group["weights"]), model.tensor(name))
    assert any("layers.0.attention.{k, q, v}" in note and "vLLM" in note for note in report.notes)
    assert report.lossless


def test_what_it_can_not_say_is_refused(tiny_model, experts_config, random_model, tmp_path):
    grouped = with_random_weights(tiny_model(dim=48, head_dim=12, ffn=80), lambda _: "int4-g32", seed=1)
    with pytest.raises(RecipeError, match="48 columns"):
        export_compressed_tensors(grouped, tmp_path / "a")
    assert export_compressed_tensors(grouped, tmp_path / "a", requantize=True).types["W8A16"] == 14
    experts = with_random_weights(random_model(experts_config()), lambda _: "int8-channel", seed=1)
    with pytest.raises(UnsupportedModelError):
        export_compressed_tensors(experts, tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(OutputError, match="--force"):
        export_model(tiny_model(**WIDE), tmp_path / "c", to="compressed-tensors")
    report = export_model(tiny_model(**WIDE), tmp_path / "c", to="compressed-tensors", force=True)
    assert report.lossless
    assert "quantization_config" not in read(tmp_path / "c")[0]
    with pytest.raises(OutputError, match="something else than an export"):  # a plain checkpoint may be the only copy
        export_model(tiny_model(**WIDE), tmp_path / "c", to="compressed-tensors", force=True)
    for _ in range(2):
        export_model(mixed(tiny_model(**WIDE)), tmp_path / "d", to="compressed-tensors", force=True)


@pytest.fixture
def transformers():
    for package in ("torch", "compressed_tensors", "transformers"):
        pytest.importorskip(package, reason=NEEDED)
    return pytest.importorskip("transformers")


def logits_of(transformers, folder: Path, ids: np.ndarray, dtype: str = "float32"):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype, dtype)).eval()
    with torch.no_grad():
        return model, model(torch.from_numpy(ids)).logits.float().numpy()


def nll(logits: np.ndarray, ids: np.ndarray) -> float:
    shifted = logits[:, :-1] - logits[:, :-1].max(axis=2, keepdims=True)
    picked = np.take_along_axis(shifted, ids[:, 1:, None], axis=2)[..., 0]
    return float((np.log(np.exp(shifted).sum(axis=2)) - picked).mean())


def text_windows(hearth_path: Path, texts_path: Path) -> np.ndarray:
    from trilemma.model.tokenizer import Tokenizer

    ids = Tokenizer.load(hearth_path).encode_plain(texts_path.read_text(encoding="utf-8")[:12_000])
    return np.asarray(ids[: 4 * 256], np.int64).reshape(4, 256)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["W4A16-g32", "W4A16-g128-e16", "W8A16", "W8A8-g32", "mixed"])
def test_transformers_computes_what_the_dequantized_model_does(transformers, hearth_path, texts_path, tmp_path, scheme):
    original = load_any(hearth_path)
    model = mixed(original) if scheme == "mixed" else apply_recipe(original, scheme_to_recipe(scheme), Build())
    if scheme == "mixed":  # inputs in int8 are another test's
        model = model.with_tensors({"layers.1.ffn.down.weight": original.stored("layers.1.ffn.down.weight")})
    export_compressed_tensors(model, tmp_path / "out")
    if not FORMATS.get(model.format_of("embedding.weight")).floating:
        rounded = model.tensor("embedding.weight").astype(np.float16).astype(np.float32)
        model = model.with_tensors({"embedding.weight": rounded})
    write_checkpoint(model, tmp_path / "plain", dtype="f32")
    ids = text_windows(hearth_path, texts_path)
    found, ours = logits_of(transformers, tmp_path / "out", ids)
    _, wanted = logits_of(transformers, tmp_path / "plain", ids)
    assert any("ompressed" in type(part).__name__ or hasattr(part, "quantization_scheme") for part in found.modules())
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)
    assert nll(ours, ids) == pytest.approx(nll(wanted, ids), abs=1e-5)
    _, half = logits_of(transformers, tmp_path / "out", ids, "auto")
    assert nll(half, ids) == pytest.approx(nll(wanted, ids), abs=2e-3)


def rounded_inputs(module, inputs):
    """Textbook int8 with a scale a token over the 255 steps of the range."""
    import torch

    (x,) = inputs
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    return (torch.clamp(torch.round(x / scale), -128, 127) * scale,)


@pytest.mark.filterwarnings("ignore")
def test_transformers_rounds_the_inputs_of_w8a8(transformers, hearth_path, texts_path, tmp_path):
    import torch

    model = apply_recipe(load_any(hearth_path), scheme_to_recipe("W8A8-e16"), Build())
    report = export_compressed_tensors(model, tmp_path / "out")
    assert report.types["W8A8"] == 42
    assert any("for a token there" in note for note in report.notes)
    write_checkpoint(model, tmp_path / "plain", dtype="f32")
    ids = text_windows(hearth_path, texts_path)
    _, ours = logits_of(transformers, tmp_path / "out", ids)
    plain, unrounded = logits_of(transformers, tmp_path / "plain", ids)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded_inputs)
    with torch.no_grad():
        wanted = plain(torch.from_numpy(ids)).logits.numpy()
    assert nll(ours, ids) == pytest.approx(nll(wanted, ids), abs=1e-3)
    assert np.abs(ours - wanted).mean() < 0.2 * np.abs(wanted - unrounded).mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["qwen3", "gemma3", "phi3", "gpt_neox", "gpt2", "mixtral"])
def test_every_family_that_it_can_say(transformers, case, save_hf, tmp_path, random_generator):
    kind, options = CASES[case]
    _, folder = save_hf(kind, **options)
    model = apply_recipe(load_any(folder), scheme_to_recipe("W8A16-e16"), Build())
    if case in ("gpt2", "mixtral"):
        with pytest.raises(UnsupportedModelError, match="Export GGUF"):
            export_compressed_tensors(model, tmp_path / "out")
        return
    export_compressed_tensors(model, tmp_path / "out")
    write_checkpoint(model, tmp_path / "plain", dtype="f32")
    ids = random_generator.integers(3, 113, (2, 40))
    _, ours = logits_of(transformers, tmp_path / "out", ids)
    _, wanted = logits_of(transformers, tmp_path / "plain", ids)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)
