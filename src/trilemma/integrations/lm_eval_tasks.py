"""Local task files as tasks of lm-eval: a YAML file and its items, so that nothing is fetched.

    python -m trilemma.integrations.lm_eval_tasks piqa=piqa.jsonl lambada=lambada.jsonl -o tasks
    trilemma lm-eval run --model trilemma --model_args path=... --include_path tasks --tasks local_piqa,local_lambada

The items are those of `trilemma eval --task`, and so are the requests: what stands between context and answer is
written into the context, whose trailing white space lm-eval gives to the answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trilemma.core.errors import InputError
from trilemma.core.files import write_whole
from trilemma.measure.quality.tasks.items import Kind, Task, TaskItem, read_task

PREFIX = "local_"  # lm-eval's own tasks have the bare names

_FORMS: dict[Kind, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
    },
    "contexts": {
        "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
    },
    "continuation": {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"},
}  # fmt: skip
_METRICS: dict[Kind, tuple[str, ...]] = {
    "choices": ("acc", "acc_norm"), "contexts": ("acc",), "continuation": ("acc",)
}  # fmt: skip


def write_tasks(files: Mapping[str, str | Path], folder: str | Path, limit: int | None = None) -> list[str]:
    """Write `<name>.yaml` and `<name>.jsonl` for each task file; the names for lm-eval's --tasks are returned.

    Args:
        files: name -> file of items, see `measure.quality.tasks.items`.
        folder: where they are written, made where it is not there; give it to lm-eval as --include_path.
        limit: items of each task, the first so many.

    Raises:
        DataError: a file that holds no such items. OutputError: the folder can not be written to.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    names = []
    for name, path in files.items():
        task = read_task(name, path, limit)
        items = write_whole(place / f"{PREFIX}{name}.jsonl", "".join(_line(task, item) for item in task.items))
        write_whole(place / f"{PREFIX}{name}.yaml", yaml.safe_dump(_settings(task, items.resolve()), sort_keys=False))
        names.append(PREFIX + name)
    return names


def _settings(task: Task, items: Path) -> dict[str, Any]:
    return {
        "task": PREFIX + task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        **_FORMS[task.kind],
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _METRICS[task.kind]
        ],
        "metadata": {"version": 1.0},
    }


def _line(task: Task, item: TaskItem) -> str:
    """An item as one JSON line; delimiters end the contexts."""
    row: dict[str, Any]
    if task.kind == "choices":
        between = item.options[0][1][: -item.lengths[0]]
        texts = [text[-length:] for (_, text), length in zip(item.options, item.lengths, strict=True)]
        row = {"query": item.options[0][0] + between, "choices": texts, "gold": item.gold}
    else:
        contexts = [context + _lead(text) for context, text in item.options]
        continuation = item.options[0][1][len(_lead(item.options[0][1])) :]
        row = {"continuation": continuation}
        row |= {"contexts": contexts, "gold": item.gold} if task.kind == "contexts" else {"context": contexts[0]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lead(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def main() -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Write local task files as tasks of lm-eval.")
    parser.add_argument("tasks", nargs="+", metavar="NAME=FILE")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for lm-eval's --include_path")
    parser.add_argument("--limit", type=int, help="items of each task")
    given = parser.parse_args()
    unnamed = next((item for item in given.tasks if "=" not in item.lstrip("=")), None)
    if unnamed is not None:
        raise InputError(f"A task is given as name=file, such as piqa=piqa.jsonl; not '{unnamed}'.")
    files = dict(item.split("=", 1) for item in given.tasks)
    print(",".join(write_tasks(files, given.output, given.limit)))


if __name__ == "__main__":
    main()
