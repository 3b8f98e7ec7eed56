"""lm-eval's own `hf` model and ours on unmodified checkpoints in f32: the same accuracies, the same likelihoods.

    python benchmarks/lm_eval_agreement.py --model examples/models/hearth-7m \
        --task piqa=piqa.jsonl --task lambada=lambada.jsonl --items 100

Every request of every task goes through both. The bar: accuracies identical, log-likelihoods within 1e-3 nats, the
same greedy matches. Exit code 1 when it is missed. One JSON line a model and task; the largest differences last.
Needs the extra `eval`, torch, transformers and accelerate. Nothing is fetched; no code of a model is run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import trilemma.integrations.lm_eval  # noqa: E402, F401  (registers our model)
from trilemma.core.environment import usable_cores  # noqa: E402
from trilemma.integrations.lm_eval_tasks import write_tasks  # noqa: E402

BAR_NATS = 1e-3


def main() -> None:
    given = _arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = dict(item.split("=", 1) for item in given.task)
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(files, folder, given.items)
        rows = [row for model in given.model for row in compare(model, names, Path(folder), given.threads)]
    for row in rows:
        print(json.dumps(row))
    worst = max(row["largest_difference_nats"] for row in rows)
    same = all(row["same_accuracies"] and row["same_greedy"] for row in rows)
    met = same and worst <= BAR_NATS
    requests = sum(row["requests"] for row in rows)
    print(f"{requests} requests: log-likelihoods within {worst:.2g} nats (bar {BAR_NATS:g}), accuracies and greedy "
          f"matches {'identical' if same else 'DIFFERENT'}: {'met' if met else 'MISSED'}")  # fmt: skip
    sys.exit(0 if met else 1)


def compare(model: str, names: list[str], folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """One row a task: accuracies of both, and the largest difference of a request's log-likelihood."""
    theirs, their_s = run("hf", {"pretrained": model, "dtype": "float32", "device": "cpu"}, names, folder, batch=4)
    ours, our_s = run("trilemma", {"path": model, "kv": "f32", "threads": threads}, names, folder)
    for name in names:
        pairs = list(zip(ours["samples"][name], theirs["samples"][name], strict=True))
        assert all(a["arguments"] == b["arguments"] for a, b in pairs), "the two were asked different things"
        both = [(x[0], y[0]) for a, b in pairs for x, y in zip(a["resps"], b["resps"], strict=True)]
        accuracies = {label: _accuracies(found["results"][name]) for label, found in (("ours", ours), ("hf", theirs))}
        yield {
            "model": Path(model).name, "task": name, "items": len(pairs), "requests": len(both),
            "largest_difference_nats": max(abs(x[0] - y[0]) for x, y in both),
            "same_greedy": all(x[1] == y[1] for x, y in both),
            "same_accuracies": accuracies["ours"] == accuracies["hf"], **accuracies,
            "seconds_all_tasks": {"ours": round(our_s, 1), "hf": round(their_s, 1)},
        }  # fmt: skip


def run(
    model: str, settings: dict[str, Any], names: list[str], folder: Path, batch: int = 1
) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, model_args=settings, tasks=names, task_manager=tasks, batch_size=batch, bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip
    assert found is not None
    return found, time.perf_counter() - started


def _accuracies(results: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in results.items() if key in ("acc,none", "acc_norm,none")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lm-eval's hf model and ours, request by request.")
    parser.add_argument("--model", action="append", required=True, help="checkpoint folder; may be repeated")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--items", type=int, default=100, help="of each task, the first so many")
    parser.add_argument("--threads", type=int, default=usable_cores())
    return parser.parse_args()


if __name__ == "__main__":
    main()
