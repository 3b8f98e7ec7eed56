"""Per-document figures of real candidates on real text: the populations that `coverage.py` and `verdicts.py` draw from.

Every document (a section of a book or article) is scored once by the unmodified model in f32 arithmetic and
by candidates of several schemes. What is kept: per-token nats and KL, agreement, and bytes of text, so that
any figure of any sample of documents can be computed, and the truth over the whole population as well.

    python benchmarks/real_scores.py MODEL kids=valid.txt adult=other.txt --out scores.npz

Leaves out everything that depends on a machine: times are simulated where they are used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilemma.data.documents import Document, cut_document, read_documents
from trilemma.data.windows import make_windows
from trilemma.formats.artifact import load_any
from trilemma.model.model import RunSettings
from trilemma.model.tokenizer import Tokenizer
from trilemma.runtime import EngineOptions, open_engine
from trilemma.techniques.apply import compress

SCHEMES = ("W8A8-g32", "W4A8-g32", "W4A8-g128", "W8A8")
CONTEXT = 512
SECTION_CHARACTERS = 8_000
MOST_WINDOWS = 3  # what the default amounts of text take of a document at most

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class RealScores:
    """Token figures of a whole population of documents.

    owners: (tokens,) document of each predicted token; domains: (documents,); text_bytes: (documents,);
    base_nll: (tokens,); nll, kl: scheme -> (tokens,) nats; agrees: scheme -> (tokens,) bool.
    """

    owners: NDArray[np.int64]
    domains: NDArray[np.str_]
    text_bytes: NDArray[np.float64]
    base_nll: Float32
    nll: dict[str, Float32]
    kl: dict[str, Float32]
    agrees: dict[str, NDArray[np.bool_]]

    @classmethod
    def load(cls, path: Path) -> RealScores:
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files}
        schemes = [name.removeprefix("kl/") for name in kept if name.startswith("kl/")]
        return cls(
            kept["owners"], kept["domains"], kept["text_bytes"], kept["base_nll"],
            {name: kept[f"nll/{name}"] for name in schemes}, {name: kept[f"kl/{name}"] for name in schemes},
            {name: kept[f"agrees/{name}"] for name in schemes},
        )  # fmt: skip


def build(model: Path, texts: dict[str, Path], most_documents: int, out: Path, schemes: tuple[str, ...]) -> None:
    """Score up to `most_documents` documents of each domain and write them all at once."""
    base = load_any(model)
    tokenizer = Tokenizer.load(model)
    rng = np.random.default_rng(0)
    documents = [item for name, path in texts.items() for item in _documents(path, name, most_documents, rng)]
    owners, sizes = [], np.zeros(len(documents))
    rows: dict[str, list[np.ndarray]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        options = EngineOptions(kv_cache="f32", max_context=CONTEXT)
        engines = {"": open_engine(base.with_run(RunSettings(kv_cache="f32")), options=options)}
        for name in schemes:
            compress(model, Path(scratch) / name, scheme=name)
            made = load_any(Path(scratch) / name)
            engines[name] = open_engine(made, options=EngineOptions(max_context=CONTEXT))
        for index, document in enumerate(documents):
            most = CONTEXT * int(rng.integers(1, MOST_WINDOWS + 1))
            cut = make_windows([document], tokenizer.encode_plain, CONTEXT, most, decode=tokenizer.decode)
            sizes[index] = cut.text_bytes.sum()
            for window in cut.windows:
                owners.append(np.full(len(window) - 1, index))
                logits = {name: _log_softmax(engine.logits(list(window))) for name, engine in engines.items()}
                for key, values in _figures(logits, np.asarray(window)[1:]).items():
                    rows.setdefault(key, []).append(values)
            if index % 20 == 0:
                spent = time.perf_counter() - began
                left = spent * (len(documents) / (index + 1) - 1)
                print(f"{index} of {len(documents)} documents, {left:.0f} s left", file=sys.stderr, flush=True)
        for engine in engines.values():
            engine.close()
    everything = {key: np.concatenate(parts) for key, parts in rows.items()}
    domains = np.asarray([document.domain for document in documents])

    partial = out.with_name(f".{out.name}.part")
    with partial.open("wb") as file:
        np.savez(file, owners=np.concatenate(owners), domains=domains, text_bytes=sizes, **everything)
    partial.replace(out)


def _documents(path: Path, domain: str, most: int, rng: np.random.Generator) -> list[Document]:
    whole = read_documents([path], domain, prepare="book", cut=False)
    sections = [part for item in whole for part in cut_document(item, SECTION_CHARACTERS)]
    chosen = rng.permutation(len(sections))[:most]
    return [sections[index] for index in sorted(chosen)]


def _log_softmax(logits: Float32) -> Float32:
    rows = logits[:-1].astype(np.float32)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def _figures(logits: dict[str, Float32], targets: NDArray[np.int32]) -> dict[str, np.ndarray]:
    at = np.arange(len(targets))
    base = logits[""]
    p, best = np.exp(base), base.argmax(axis=1)
    found: dict[str, np.ndarray] = {"base_nll": -base[at, targets]}
    for name, ours in logits.items():
        if name:
            found[f"nll/{name}"] = -ours[at, targets]
            found[f"kl/{name}"] = np.maximum((p * (base - ours)).sum(axis=1, dtype=np.float64), 0).astype(np.float32)
            found[f"agrees/{name}"] = ours.argmax(axis=1) == best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", nargs="+", metavar="DOMAIN=FILE")
    parser.add_argument("--documents", type=int, default=250, help="of each domain, at most")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    texts = {item.split("=", 1)[0]: Path(item.split("=", 1)[1]) for item in options.texts}
    build(options.model, texts, options.documents, options.out, tuple(options.schemes.split(",")))


if __name__ == "__main__":
    main()
