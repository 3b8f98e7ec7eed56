"""A training run on disk: weights, optimizer state, random state and position, in one safetensors file.

One file, written beside and renamed, so that a kill at any moment leaves the last whole checkpoint.
Plain numbers are JSON in the file's metadata; nothing is pickled, so loading runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trilemma.core.errors import CheckpointError, OutputError

STATE_VERSION = 1
STATE_FILE = "training.safetensors"


def save_state(folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]) -> None:
    """Replace the folder's checkpoint with the present state.

    Raises:
        OutputError: it can not be written; the checkpoint before it is untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(module, optimizers)}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    beside = folder / f".{STATE_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={"training": json.dumps({"version": STATE_VERSION, **facts})})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"Can not write the training checkpoint to '{folder}': {error}. Free space there.") from None


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The plain numbers of the folder's checkpoint, or None when there is none.

    Raises:
        CheckpointError: damaged, or of a version that this release can not read.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["training"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"'{path}' is no training checkpoint, or is damaged ({error}). Delete it to start again."
        ) from None
    if facts.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"'{path}' has version {facts.get('version')}; this release reads version {STATE_VERSION}. "
            "Finish that run with the release that began it, or delete the file to start again."
        )
    return facts


def restore_state(folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put the folder's checkpoint into module, optimizers and torch's random generators.

    Raises:
        CheckpointError: it belongs to a module of other tensors.
    """
    path = folder / STATE_FILE
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        for name, tensor in _module_tensors(module):
            if name not in saved or tuple(file.get_slice(name).get_shape()) != tuple(tensor.shape):
                raise CheckpointError(
                    f"'{path}' has no tensor '{name}' of shape {tuple(tensor.shape)}: it belongs to another model. "
                    "Use another folder, or delete the file to start again."
                )
            tensor.copy_(file.get_tensor(name))
        for prefix, parameter, state in _parameter_states(module, optimizers):
            for name in saved:
                if name.startswith(prefix):
                    value = file.get_tensor(name)
                    # A zero-dimensional tensor is a step counter; torch keeps those on the CPU.
                    state[name.removeprefix(prefix)] = value.to(parameter.device) if value.ndim else value.clone()
        torch.set_rng_state(file.get_tensor("random.cpu"))
        if "random.cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("random.cuda"))


def _tensors(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    yield from _module_tensors(module)
    for prefix, _, state in _parameter_states(module, optimizers):
        for key, value in state.items():
            yield f"{prefix}{key}", value


def _module_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state dict once: tied weights appear under their first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield f"module.{name}", tensor


def _parameter_states(
    module: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """(name prefix in the file, parameter, its optimizer state) of every trained parameter."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield f"optimizer.{names[id(parameter)]}:", parameter, optimizer.state[parameter]
