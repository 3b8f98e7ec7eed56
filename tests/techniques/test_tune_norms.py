"""Norm tuning: rounded as the engines round, gradients as if nothing were, codes left alone, stops that resume."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from trilemma.core.errors import StoppedError
from trilemma.core.recipe import Recipe, Step
from trilemma.formats.artifact import read_artifact
from trilemma.model.decoder import Decoder
from trilemma.runtime.reference import round_int8_groups
from trilemma.techniques import Build
from trilemma.techniques.apply import apply_recipe, compress
from trilemma.techniques.distill.objective import DistillationLoss
from trilemma.techniques.distill.rounding import round_straight_through, straight_through
from trilemma.techniques.distill.teacher import TorchTeacher
from trilemma.techniques.schemes import scheme_to_recipe


@pytest.mark.parametrize("scheme", ["W4A8-g32", "W8A16"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_rounds_where_the_reference_engine_rounds(tiny_model, tokens, scheme, tied, engine_logits):
    packed = apply_recipe(tiny_model(seed=int(tokens[0, 0]), tied=tied), scheme_to_recipe(scheme), Build())
    decoder = Decoder.from_model(packed)
    round_straight_through(decoder, packed)
    wanted = engine_logits(packed, tokens[0], "torch")
    with torch.no_grad():
        ours = decoder(torch.from_numpy(tokens[:1].astype(np.int64)))[0].numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())
    rows = DistillationLoss(TorchTeacher(Decoder.from_model(packed)))
    assert rows(decoder, (torch.tensor([0]), torch.from_numpy(tokens[:1].astype(np.int64)))) > 1e-7  # head included


def test_the_head_of_an_untied_model_is_rounded_in_the_loss_too(tiny_model, tokens):
    packed = apply_recipe(tiny_model(seed=5, tied=False), scheme_to_recipe("W8A8"), Build())
    only_head = packed.with_tensors({}, {name: run.model_copy(update={"activation": "f32"})
                                         for name, run in packed.linears.items() if name != "head.weight"})  # fmt: skip
    decoder, plain = Decoder.from_model(only_head), Decoder.from_model(only_head)
    round_straight_through(decoder, only_head)
    batch = (torch.tensor([0]), torch.from_numpy(tokens[:1].astype(np.int64)))
    assert DistillationLoss(TorchTeacher(plain))(decoder, batch) > 1e-8


def test_gradients_pass_straight_through():
    x = torch.linspace(-1, 1, 64, requires_grad=True)
    (3 * straight_through(x, round_int8_groups)).sum().backward()
    assert torch.equal(x.grad, torch.full((64,), 3.0))
    assert not torch.equal(straight_through(x, round_int8_groups), x)


def kl(model, original, tokens) -> float:
    decoder = Decoder.from_model(model).requires_grad_(False)
    round_straight_through(decoder, model)
    batch = (torch.arange(len(tokens)), torch.from_numpy(tokens.astype(np.int64)))
    return float(DistillationLoss(TorchTeacher(Decoder.from_model(original)))(decoder, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_it_comes_nearer_to_the_original_and_keeps_every_code(tiny_model, tokens, tied):
    original = tiny_model(seed=int(tokens[0, 1]), tied=tied)
    packed = apply_recipe(original, scheme_to_recipe("W4A8-g32"), Build())
    step = Step(technique="tune-norms", settings={"steps": 60, "batch_size": 4})
    tuned = apply_recipe(packed, Recipe(steps=(step,)), Build(calibration=tokens, original=original, threads=1))
    assert kl(tuned, original, tokens) < 0.9 * kl(packed, original, tokens)
    for name, shape in original.config.tensor_shapes().items():
        if len(shape) == 2:
            assert tuned.stored(name) is packed.stored(name)
            assert tuned.linear(name) == packed.linear(name)


def test_a_stopped_compress_keeps_its_checkpoint_and_the_same_call_ends_in_the_same_bits(tiny_model, tokens, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without one

    def stop(done: int, total: int, what: str) -> None:
        if "step 6/" in what:
            signal.raise_signal(signal.SIGINT)

    def run(output, progress=None):
        recipe = scheme_to_recipe("W4A8-g32+tune12")
        compress(tiny_model(seed=3), output, recipe=recipe, calibration=tokens, threads=1, progress=progress)
        return {name: read_artifact(output).tensor(name) for name in read_artifact(output)}

    try:
        with pytest.raises(StoppedError, match="goes on from there"):
            run(tmp_path / "two", stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "two.work").is_dir()
    seen: list[str] = []
    resumed = run(tmp_path / "two", lambda done, total, what: seen.append(what))
    assert not any("step 6/" in what for what in seen)
    assert not (tmp_path / "two.work").exists()
    whole = run(tmp_path / "one")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
