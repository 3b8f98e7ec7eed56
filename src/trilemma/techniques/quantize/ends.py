"""Embedding, head and learned positions: what stands outside layers, on grids of its own.

Most quantizers round them to nearest (`round_ends`). With a guide, codes of embedding and head are chosen by GPTQ for
what their errors cost in the model's answers, each row with a Hessian of its own (`vocabulary_guide.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats.grid import Format
from trilemma.formats.pack import PackedMatrix, join_rows, pack
from trilemma.formats.quantize import find_grid
from trilemma.model.model import Float32, Model, StoredMatrix
from trilemma.model.plain import PlainMatrix
from trilemma.techniques.calibration import side_by_side
from trilemma.techniques.quantize.assignment import named
from trilemma.techniques.quantize.gptq import GptqSettings, find_feedback, gptq_codes
from trilemma.techniques.quantize.rtn import round_ends, scale_rule
from trilemma.techniques.stored import row_parts, row_reader
from trilemma.techniques.technique import Build, report
from trilemma.techniques.vocabulary_guide import VocabularyGuide

_ROWS = 4096  # of a vocabulary whose codes are chosen together


def quantize_ends(
    model: Model, formats: Mapping[str, Format], build: Build, guide: VocabularyGuide, settings: GptqSettings
) -> dict[str, PackedMatrix | PlainMatrix]:
    """Every matrix outside layers in its format; codes of embedding and head are chosen by the guide.

    Raises:
        RecipeError: naming the tensor, as `quantize_gptq`.
    """
    costs = {"embedding.weight": guide.tied() if model.config.tied else (guide.embedding(), None)}
    if not model.config.tied:
        costs["head.weight"] = guide.head()
    chosen = {name: spec for name, spec in formats.items() if name in costs and not spec.floating}
    found = round_ends(model, {name: spec for name, spec in formats.items() if name not in chosen}, build)
    for name, spec in chosen.items():
        report(build, 0, len(model.config.layers), f"choosing codes of {name}")
        try:
            found[name] = _choose(model.stored(name), *costs[name], spec, settings, build.threads)
        except RecipeError as error:
            raise named(name, error) from None
    return found


def _choose(
    stored: Float32 | StoredMatrix, hessian: Tensor, directions: Tensor | None, spec: Format, settings: GptqSettings,
    threads: int | None,
) -> PackedMatrix:  # fmt: skip
    """stored, directions (vocab, dim); hessian (dim, dim)."""
    importance = hessian.diagonal()
    if directions is not None:
        importance = importance + directions.square().mean(0)
    heavy, read = importance.to("cpu", torch.float32).numpy(), row_reader(stored)
    feedback = find_feedback(hessian, settings)

    def chosen(rows: slice) -> PackedMatrix:
        weight = read(rows)
        grid = find_grid(weight, spec, scale=scale_rule(spec, settings.scale), importance=heavy)
        offsets = grid.offsets()
        codes = gptq_codes(
            torch.from_numpy(weight), feedback, torch.from_numpy(grid.steps()),
            None if offsets is None else torch.from_numpy(offsets), spec, block=settings.block,
            directions=None if directions is None else directions[rows],
        )  # fmt: skip
        return pack(grid.with_codes(codes.numpy()))

    return join_rows(side_by_side(chosen, row_parts(stored.shape, _ROWS * stored.shape[1]), threads))
