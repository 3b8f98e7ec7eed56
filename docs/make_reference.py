"""Writes docs/reference: the help of every command, the metrics, the Python API. A test holds it current.

python docs/make_reference.py            writes the pages
python docs/make_reference.py --check    says which are out of date, exit code 1
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import trilemma
from trilemma.core.metric import METRICS

REFERENCE = Path(__file__).resolve().parent / "reference"
COMMANDS = ("inspect", "optimize", "run", "check", "compress", "bench", "eval", "compare", "export", "report", "list")
NOTE = "<!-- Written by docs/make_reference.py; change the source, then run `make docs`. -->\n\n"


def commands_page() -> str:
    parts = [NOTE, "# Commands\n"]
    for command in ("", *COMMANDS):
        arguments = [command, "--help"] if command else ["--help"]
        parts.append(f"\n## trilemma {command}".rstrip() + f"\n\n```\n{_help(arguments)}\n```\n")
    return "".join(parts)


def _help(arguments: list[str]) -> str:
    plain = {**os.environ, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1", "TERM": "dumb"}
    plain.pop("FORCE_COLOR", None)
    program = "import sys; sys.argv[0] = 'trilemma'; from trilemma.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=plain, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def metrics_page() -> str:
    rows = [
        f"| `{metric.name}` | {f'`{metric.alias}`' if metric.alias else ''} | {metric.unit} | {metric.direction} |"
        f" {metric.what} |".replace("(reference || model)", "(reference ‖ model)")
        for metric in METRICS.values()
    ]
    return (
        f"{NOTE}# Metrics\n\n"
        "A limit takes the name or the alias: `tpot<=20ms`, `weights<=50%`, `ppl_increase<=2%`. MB is 10^6 bytes.\n"
        "`accuracy/<task>` is open-ended.\n\n"
        "| metric | alias | unit | better | what |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def python_page() -> str:
    parts = [NOTE, "# Python\n\nWhat `import trilemma` offers. Everything else may change without notice.\n"]
    for name in trilemma.__all__:
        thing = getattr(trilemma, name)
        kind = "class " if inspect.isclass(thing) else ""
        shown = "" if inspect.isclass(thing) else str(inspect.signature(thing)).replace("'", "")
        parts.append(f"\n## {name}\n\n```python\n{kind}trilemma.{name}{shown}\n```\n\n{inspect.getdoc(thing)}\n")
    return "".join(parts)


def pages() -> dict[Path, str]:
    return {
        REFERENCE / "commands.md": commands_page(),
        REFERENCE / "metrics.md": metrics_page(),
        REFERENCE / "python.md": python_page(),
    }


def main() -> None:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        if stale:
            sys.exit(f"out of date: {', '.join(path.name for path in stale)}; run `make docs`")
        return
    REFERENCE.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
