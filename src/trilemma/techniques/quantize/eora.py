"""EoRA: beside every quantized matrix a pair of thin ones, which give back most of what its codes lost.

Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", 2024
(arXiv:2410.21271). Of all pairs of a rank, b a is the one with the least |(D - b a) X|^2, where D is what is wanted
beyond the quantized matrix and X are its inputs on calibration text. The paper projects D on the eigenvectors of X X^T
and cuts a singular value decomposition. The same minimum needs neither: with U the first eigenvectors of D X X^T D^T,
b a = U U^T D.

D is W - Q, and what behind the compressed layers the unchanged model's outputs have beyond those of W (as `gptaq`).
With `guided`, errors are weighed by what the model's answers make of them (`output_guide.py`): a is that of C^T D,
where C C^T is the moment of the outputs' gradients. Then a is rounded to its format, and b fitted to the rounded one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from trilemma.core.errors import RecipeError
from trilemma.formats import FORMATS
from trilemma.model.config import DecoderConfig, is_router, low_rank_names, with_low_rank
from trilemma.model.model import Activation, Float32, LinearRun, Model, StoredMatrix
from trilemma.techniques.calibration import side_by_side
from trilemma.techniques.output_guide import guide_outputs
from trilemma.techniques.quantize.assignment import activation_of, known_format
from trilemma.techniques.quantize.gptaq import missing_outputs, output_blocks
from trilemma.techniques.quantize.gptq import Feedback, damped
from trilemma.techniques.quantize.rtn import round_matrix
from trilemma.techniques.technique import Build, TechniqueSettings
from trilemma.techniques.two_paths import Pair, calibrate_beside

_EXACT_ROWS = 2048  # of a matrix whose eigenvectors are found directly; of others by iteration
_ITERATIONS = 8


class EoraSettings(TechniqueSettings):
    """Settings of `eora`."""

    rank: int = Field(32, ge=1, description="columns of the pair; multiples of 32 leave no room unused in 8 bits")
    format: str = Field("int8-g32", description="how the pair is stored, such as int8-g32 or bf16")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    pull: float = Field(1.0, ge=0, le=1, description="how far outputs are pulled to the unchanged model's")
    drift: float = Field(
        1.0, ge=0, le=1, description="share of the residual stream's drift that the matrices adding to it make up for"
    )

    guided: bool = Field(
        False, description="weigh output errors by the gradients of the model's answers: lower KL, a backward pass"
    )
    rows: int = Field(1024, ge=1, description="most outputs whose errors may cancel each other, where guided")

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return known_format(value)


class Eora:
    """Give back what quantization lost, by matrices of low rank."""

    name: ClassVar[str] = "eora"
    what: ClassVar[str] = "after quantization, add to each matrix a low-rank pair that makes up for its error (EoRA)"
    Settings: ClassVar[type[EoraSettings]] = EoraSettings

    def supports(self, config: DecoderConfig) -> str | None:
        return "its layers have low-rank pairs already" if any(layer.low_rank for layer in config.layers) else None

    def needs_calibration(self, settings: EoraSettings) -> bool:
        return True

    def config_after(self, config: DecoderConfig, settings: EoraSettings) -> DecoderConfig:
        """The same shapes, and a pair beside each matrix of the layers. Raises RecipeError: no rank for such shapes."""
        shapes = config.tensor_shapes()
        least = min((min(shapes[name]) for name in config.linear_names() if not is_router(name)), default=0)
        if settings.rank >= least:
            raise RecipeError(
                f"'eora' of rank {settings.rank} needs matrices that are wider: the smallest side here is {least}. "
                f"Choose a rank far below it, such as {max(1, least // 16)}."
            )
        return with_low_rank(config, settings.rank)

    def exact(self, settings: EoraSettings) -> bool:
        return True

    def added(self, settings: EoraSettings, inputs: Mapping[str, Activation]) -> dict[str, tuple[str, Activation]]:
        """Of matrices with these inputs, the pairs: name -> format and input precision."""
        spec = FORMATS.get(settings.format)
        return {
            name: (spec.name, activation_of(spec, activation))
            for product, activation in inputs.items()
            if not is_router(product)
            for name in low_rank_names(product)
        }

    def apply(self, model: Model, settings: EoraSettings, build: Build) -> Model:
        """Raises RecipeError: nothing was quantized before in this recipe, or what was has other shapes now."""
        before = build.unquantized
        if before is None or before is model or before.config != model.config:
            raise RecipeError(
                "'eora' makes up for what quantization in the same recipe has lost, and needs the weights from before "
                "it. Put it behind the W part: W4A8-g128-gptq+eora32."
            )
        inputs = {name: model.linear(name) for name in model.config.linear_names()}
        made = self.added(settings, {name: run.activation for name, run in inputs.items()})
        runs = {name: LinearRun(activation=activation) for name, (_, activation) in made.items()}
        config = self.config_after(model.config, settings)
        shapes = config.tensor_shapes()
        zeros = {name: np.broadcast_to(np.float32(0), shapes[name]) for name in made}
        started = model.with_config(config).with_tensors(zeros, runs)
        spec = FORMATS.get(settings.format)
        moments: Mapping[str, Tensor] = {}
        if settings.guided:
            moments = build.once(
                f"guide {settings.rows}", before, lambda: guide_outputs(before, build, settings.rows)
            ).moments

        def make(found: tuple[str, Pair]) -> dict[str, StoredMatrix]:
            name, pair = found
            a_name, b_name = low_rank_names(name)
            weight, kept = (torch.from_numpy(each.tensor(name)).to(pair.matrix) for each in (before, model))
            try:
                wanted = wanted_beyond(weight, kept, pair, settings)
                weighed = weigh_outputs(wanted, moments.get(name), settings.damping)
                a, _ = least_squares_pair(weighed, pair.matrix, settings.rank, build.seed)
                stored = round_matrix(a_name, _numpy(a), spec)
                b = fitted_to(torch.from_numpy(stored.dequantize()).to(a), wanted, pair.matrix, settings.damping)
                return {a_name: stored, b_name: round_matrix(b_name, _numpy(b), spec)}
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise RecipeError(
                    f"Tensor '{name}': the calibration statistics have no eigenvectors. Use other calibration text."
                ) from None

        def corrected(pairs: Mapping[str, Pair]) -> dict[str, Float32 | StoredMatrix]:
            found = [(name, pair) for name, pair in pairs.items() if not is_router(name)]
            done = side_by_side(make, found, build.threads)
            return {name: matrix for each in done for name, matrix in each.items()}

        return calibrate_beside(started, before, build, inputs | runs, corrected, what="fitting pairs")


def wanted_beyond(weight: Tensor, kept: Tensor, pair: Pair, settings: EoraSettings) -> Tensor:
    """D (out, in): what a matrix should have beyond `kept`, so that outputs are those of the unchanged model."""
    error = weight - kept
    if not pair.tokens or not (settings.pull or settings.drift):
        return error
    missing = missing_outputs(weight, pair, settings.pull, settings.drift)
    return error + Feedback.of(pair.matrix, settings.damping).solve(missing)


def weigh_outputs(wanted: Tensor, moments: Tensor | None, damping: float) -> Tensor:
    """C^T D (out, in), with C C^T the moment of the outputs' gradients: its squares count as the model's answers do.

    moments: blocks of E[g g^T] along the outputs, as `guide_outputs` gives them, or None where all outputs are equal.
    """
    if moments is None:
        return wanted
    return torch.cat([
        torch.linalg.cholesky(damped(moment.to(wanted), damping)).T @ wanted[rows]
        for rows, moment in output_blocks(len(wanted), moments) if moment is not None
    ])  # fmt: skip


def least_squares_pair(wanted: Tensor, hessian: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) with the least trace of (D - b a) H (D - b a)^T.

    Args:
        wanted: D (out, in).
        hessian: H = X^T X (in, in) of inputs X (tokens, in). On these a x has mean squares of one size in all channels.

    Raises:
        torch.linalg.LinAlgError: values that are not finite.
    """
    found, values = _first_eigenvectors(wanted, hessian, rank, seed)
    size = values.clamp(min=0).sqrt()
    alive = size > size.max() * 1e-6
    a = torch.where(alive, 1 / size.where(alive, torch.ones_like(size)), 0)[:, None] * (found.T @ wanted)
    return a, found * size


def fitted_to(a: Tensor, wanted: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """b (out, rank) of the least error for this a (rank, in): D H a^T (a H a^T)^-1, damped."""
    inner = hessian @ a.T
    found: Tensor = torch.linalg.solve(damped(a @ inner, damping * 1e-3), (wanted @ inner).T)
    return found.T


def _numpy(values: Tensor) -> Float32:
    return values.to("cpu", torch.float32).numpy()


def _first_eigenvectors(wanted: Tensor, hessian: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (out, rank) and eigenvalues (rank,) of D H D^T, the largest first.

    Of many rows by subspace iteration with twice the rank, which finds the span of large eigenvalues whatever their
    gaps (Halko, Martinsson and Tropp 2011, arXiv:0909.4061).
    """
    rows = len(wanted)
    if rows <= _EXACT_ROWS:
        values, vectors = torch.linalg.eigh(wanted @ hessian @ wanted.T)
        return vectors[:, -rank:].flip(1), values[-rank:].flip(0)
    start = torch.randn(rows, 2 * rank, generator=torch.Generator().manual_seed(seed)).to(wanted)
    for _ in range(_ITERATIONS):
        start, _ = torch.linalg.qr(wanted @ (hessian @ (wanted.T @ start)))
    inner = wanted.T @ start
    values, turn = torch.linalg.eigh(inner.T @ hessian @ inner)
    return start @ turn[:, -rank:].flip(1), values[-rank:].flip(0)
