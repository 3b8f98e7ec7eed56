"""Reading and writing of Hugging Face style folders, a tensor at a time.

A checkpoint is config.json beside safetensors (one file, or shards with an index). Pickle files are
refused: loading one runs whatever code it carries. A hub id is fetched first (config, safetensors
and tokenizer files only). A bare config.json gives a model of random weights, to measure costs on.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from trilemma.core.errors import CheckpointError, MissingExtraError
from trilemma.model.config import DecoderConfig
from trilemma.model.families import Family, family_of
from trilemma.model.families.fields import token_ids
from trilemma.model.families.place import Place
from trilemma.model.model import Model
from trilemma.model.plain import PlainDtype
from trilemma.model.safetensors import SafetensorsFile
from trilemma.model.sources import CheckpointSource, MemorySource, RandomSource
from trilemma.model.write import model_hash, write_checkpoint

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
              "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt"]  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_DTYPES: dict[str, PlainDtype] = {"float32": "f32", "float": "f32", "bfloat16": "bf16", "float16": "f16", "half": "f16"}


def read_checkpoint(path: str | Path, *, seed: int = 0) -> Model:
    """Open a checkpoint; nothing but headers is read before a tensor is asked for.

    Args:
        path: a folder (config.json + safetensors), a config.json (random weights), or a hub id `org/name`.
        seed: of the random weights, where there are no others.

    Raises:
        CheckpointError: files missing, damaged, of the wrong shape, or pickled; names the fix.
        UnsupportedModelError: an architecture, or an option of it, that we do not run.
        MissingExtraError: a hub id, and huggingface_hub is not installed.
    """
    found = _locate(path)
    if found.is_file():
        if found.suffix != ".json":
            raise _not_a_folder(found)
        return _random_model(found, seed)
    config_path = found / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{found} has no config.json. {_what_lies_there(found)}")
    if _holds_only_a_config(found):
        return _random_model(config_path, seed)
    raw = _read_json(config_path)
    family = family_of(raw)
    config = _read_config(raw, family, found)
    return Model(config, _open_tensors(found, family, config), path=found)


def _locate(path: str | Path) -> Path:
    """The existing file or folder that is meant; a hub id is fetched."""
    text = str(path)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if _HUB_ID.fullmatch(text) and not text.endswith((".json", ".safetensors", ".gguf")):
        beside = sorted(entry.name for entry in local.parent.iterdir()) if local.parent.is_dir() else []
        if not beside:
            return _fetch(text)
        near = difflib.get_close_matches(local.name, beside, n=1)
        hint = f"Did you mean '{local.with_name(near[0])}'?" if near else "Check the spelling."
        raise CheckpointError(
            f"There is no folder '{text}', and no hub was asked, because the folder '{local.parent}' is here. {hint} "
            "To fetch that model from the hub, run in another directory, or give the folder it was downloaded to."
        )
    raise CheckpointError(
        f"There is no folder '{text}', and it is no hub id either (those look like 'organisation/name'). "
        "Give a folder with config.json and safetensors, a config.json, or a hub id."
    )


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(
            "huggingface_hub", "hub", f"There is no folder '{hub_id}'; fetching it from the hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's, httpx's and the system's errors share no base
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"There is no folder '{hub_id}', and fetching it from the hub failed: {reason} "
            "Check the spelling and the network, or download the model and give its folder."
        ) from None


def _random_model(config_path: Path, seed: int) -> Model:
    raw = _read_json(config_path)
    config = _read_config(raw, family_of(raw), config_path.parent)
    return Model(config, RandomSource(config, seed, _declared_dtype(raw)), path=config_path.parent)


def _declared_dtype(raw: Mapping[str, Any]) -> PlainDtype:
    declared = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    name = str(declared).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"config.json: 'torch_dtype' is {declared!r}; expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _read_config(raw: Mapping[str, Any], family: Family, folder: Path) -> DecoderConfig:
    """The config, with the end-of-text ids of generation_config.json where that file names some."""
    config = family.read_config(raw)
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    ends = token_ids(_read_json(path), "eos_token_id", config.vocab_size)
    return config.model_copy(update={"eos_token_ids": ends}) if ends else config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Can not read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Fetch the file again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object. Fetch the file again.")
    return cast(dict[str, Any], found)


def _open_tensors(folder: Path, family: Family, config: DecoderConfig) -> CheckpointSource:
    holders = _tensor_files(folder)
    aliases = family.aliases
    places: dict[str, tuple[SafetensorsFile, Place]] = {}
    missing = []
    for name, shape in config.tensor_shapes().items():
        place = family.place(name, config)
        stored_name = next((other for other in _spellings(place.name, aliases) if other in holders), None)
        if stored_name is None:
            missing.append(place.name)
            continue
        file, wanted = holders[stored_name], place.stored_shape(shape)
        if file.entries[stored_name].shape != wanted:
            raise CheckpointError(
                f"Tensor '{stored_name}' in {file.path} has shape {file.entries[stored_name].shape}; "
                f"config.json says {wanted}. Config and weights belong to different models."
            )
        places[name] = (file, replace(place, name=stored_name))
    if missing:
        raise CheckpointError(_missing_message(folder, missing))
    read = {place.name for _, place in places.values()}
    unknown = [name for name in holders if name not in read and not family.is_harmless(name, config)]
    return CheckpointSource(places, tuple(sorted(unknown)))


def _spellings(name: str, aliases: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """The name itself, then with each other beginning that published files use."""
    yield name
    for ours, theirs in aliases:
        if name.startswith(ours):
            yield theirs + name.removeprefix(ours)


def _missing_message(folder: Path, missing: list[str]) -> str:
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    text = f"{folder} lacks tensor '{missing[0]}'{others}, which config.json asks for."
    if missing == ["lm_head.weight"]:
        return f'{text} If the head shares the embedding, set "tie_word_embeddings": true in config.json.'
    return f"{text} A shard is missing or the config belongs to another model: fetch the checkpoint again."


def _tensor_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Name in the files -> the file that holds it."""
    index_path = folder / _INDEX
    if (folder / _SINGLE).is_file():
        file = SafetensorsFile(folder / _SINGLE)
        return dict.fromkeys(file.entries, file)
    if index_path.is_file():
        return _indexed(folder, index_path)
    shards = sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    if shards:
        return _numbered(folder, shards)
    raise CheckpointError(f"{folder} has no model.safetensors. {_what_lies_there(folder)}")


def _indexed(folder: Path, index_path: Path) -> dict[str, SafetensorsFile]:
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no 'weight_map'. Fetch the file again.")
    opened: dict[str, SafetensorsFile] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard:
            raise CheckpointError(f"{index_path} names the shard {shard!r}; expected a file of the same folder.")
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"Shard {shard} is missing from {folder} ({index_path.name} names it). Fetch it again."
            )
        opened[shard] = SafetensorsFile(folder / shard)
    for name, shard in weight_map.items():
        if name not in opened[shard].entries:
            raise CheckpointError(f"Tensor '{name}' is not in {folder / shard}, where {index_path.name} puts it.")
    return {name: opened[shard] for name, shard in weight_map.items()}


def _numbered(folder: Path, shards: list[Path]) -> dict[str, SafetensorsFile]:
    """Shards without an index: usable when every number is there."""
    match = _SHARD.fullmatch(shards[0].name)
    assert match is not None
    count = int(match[2])
    present = {path.name for path in shards}
    for number in range(1, count + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        if name not in present:
            raise CheckpointError(f"Shard {name} is missing from {folder}. Fetch it again.")
    holders: dict[str, SafetensorsFile] = {}
    for path in shards:
        file = SafetensorsFile(path)
        holders |= dict.fromkeys(file.entries, file)
    return holders


def _holds_only_a_config(folder: Path) -> bool:
    """No weights of any kind and no tokenizer: a description, not a damaged download."""
    weights = ("*.safetensors", "*.safetensors.index.json", "*.gguf", *_PICKLES)
    return not any(any(folder.glob(pattern)) for pattern in weights) and not any(
        (folder / name).exists() for name in _TOKENIZERS
    )


def _what_lies_there(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return _pickle_message(pickles[0])
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"It has {ggufs[0]}: give that file itself."
    if (folder / "config.json").is_file():
        return "Fetch the weights (*.safetensors), or give the path of config.json itself for random weights."
    return "Give the folder that holds config.json and the safetensors files."


def _pickle_message(name: str) -> str:
    return (
        f"It has {name}, a pickle, which can run code when loaded and is refused. Where you trust it, convert it:\n"
        "    import torch, safetensors.torch as st\n"
        f"    tensors = torch.load('{name}', map_location='cpu', weights_only=True)\n"
        "    st.save_file({k: v.clone().contiguous() for k, v in tensors.items()}, 'model.safetensors')"
    )


def _not_a_folder(path: Path) -> CheckpointError:
    if path.suffix in {pattern[1:] for pattern in _PICKLES}:
        return CheckpointError(f"{path} is not read. {_pickle_message(path.name).removeprefix('It has ')}")
    if path.suffix == ".safetensors":
        return CheckpointError(f"{path} holds weights alone. Give its folder, which must have config.json too.")
    return CheckpointError(f"{path} is no model. Give a folder with config.json and safetensors, or a config.json.")


__all__ = ["CheckpointSource", "MemorySource", "RandomSource", "model_hash", "read_checkpoint", "write_checkpoint"]
