"""AutoRound, GPTQModel or llm-compressor on one checkpoint, in a Python of its own that has it; nothing of ours.

The task, as JSON on the command line: {"peer", "model": folder, "windows": .npy of (n, context) tokens, "bits",
"group", "threads", "output": folder, "more": settings beside the peer's defaults}. What is left in `output` is the
checkpoint with every quantized matrix replaced by what its codes and scales mean, in f32. The last line printed is
JSON: seconds from the opened model to the quantized one, peak memory, versions.

All quantize the linear modules inside layers, symmetrically, at their own defaults but for bits and group; the
model is opened in f32, so that neither side's weights are rounded a second time.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Task = Mapping[str, Any]
Found = dict[str, Any]  # module name -> dequantized weight (out, in), a torch tensor


class Clock:
    """Wall and processor seconds since it was made, until `stop`."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = -time.monotonic(), -time.process_time()

    def stop(self) -> Clock:
        self.seconds += time.monotonic()
        self.cpu_seconds += time.process_time()
        return self


def opened(task: Task) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(task["model"])


def windows_of(task: Task) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.load(task["windows"]).astype(np.int64))


def linears(model: Any) -> dict[str, Any]:
    """The weights of linear modules inside layers, by module name."""
    import torch

    return {name: module.weight.detach() for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name}  # fmt: skip


def auto_round(task: Task) -> tuple[Clock, Found]:
    from auto_round import AutoRound

    model, tokenizer = opened(task)
    windows = list(windows_of(task)[:, None])
    clock = Clock()
    data = {"dataset": windows, "seqlen": windows[0].shape[-1], "nsamples": len(windows)}
    grid = {"bits": task["bits"], "group_size": task["group"], "sym": True}
    rounder = AutoRound(model, tokenizer, device_map="cpu", **grid, **data, **task["more"])
    rounded, _ = rounder.quantize()
    return clock.stop(), linears(rounded)


def gptqmodel(task: Task) -> tuple[Clock, Found]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, task["threads"])))  # its own choice fails on two cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    more = {"offload_to_disk": False} | task["more"]  # weights on disk can not be looked at
    config = QuantizeConfig(bits=task["bits"], group_size=task["group"], **more)
    model = GPTQModel.load(task["model"], config, device="cpu", dtype="float32")
    rows = [{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in windows_of(task)]
    clock = Clock()
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    clock.stop()
    packed = {name: module for name, module in model.model.named_modules() if hasattr(module, "dequantize_weight")}
    for module in packed.values():  # they are packed for a file whose readers add 1 to every zero
        convert_gptq_v1_to_v2_format_module(module, task["bits"], module.pack_dtype)
    return clock, {name: module.dequantize_weight().T for name, module in packed.items()}


def llmcompressor(task: Task) -> tuple[Clock, Found]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model, tokenizer = opened(task)
    windows = windows_of(task)
    rows = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": (windows * 0 + 1).tolist()})
    weights = {"num_bits": task["bits"], "type": "int", "symmetric": True, "strategy": "group",
               "group_size": task["group"]}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = GPTQModifier(config_groups=groups, ignore=["lm_head"], **task["more"])
    clock = Clock()
    oneshot(model=model, tokenizer=tokenizer, dataset=rows, recipe=modifier, max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows))  # fmt: skip
    return clock.stop(), linears(model)


PEERS: dict[str, tuple[str, Callable[[Task], tuple[Clock, Found]]]] = {
    "auto-round": ("auto-round", auto_round),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "llm-compressor": ("llmcompressor", llmcompressor),
}


def write(task: Task, weights: Found) -> int:
    """The checkpoint with these weights in place of its own; how many there are."""
    from safetensors.torch import load_file, save_file

    source, output = Path(task["model"]), Path(task["output"])
    output.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            shutil.copy(path, output)
    tensors = {
        name: tensor.float() for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    for name, weight in weights.items():
        if tensors[f"{name}.weight"].shape != weight.shape:
            raise SystemExit(f"{name} has the shape {tuple(weight.shape)}")
        tensors[f"{name}.weight"] = weight.float().contiguous()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return len(weights)


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(task["threads"])}
    os.chdir(Path(task["output"]).parent)  # some leave logs where they run
    import torch

    torch.set_num_threads(task["threads"])
    package, quantize = PEERS[task["peer"]]
    clock, weights = quantize(task)
    count = write(task, weights)
    versions = {name: importlib.metadata.version(name) for name in (package, "torch", "transformers")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**vars(clock), "matrices": count, "versions": versions, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
