"""Distillation: losses against textbook formulas in f64, kept answers against whole ones, students that learn."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional

from trilemma.core.errors import DataError, RecipeError, StoppedError
from trilemma.core.recipe import Recipe, Step
from trilemma.model.decoder import Decoder
from trilemma.techniques import TECHNIQUES, Build
from trilemma.techniques.apply import apply_recipe
from trilemma.techniques.distill.heal import HealSettings, Lesson
from trilemma.techniques.distill.losses import FullRows, LogitRows, TopRows, chunked_loss, divergence, mixed_loss
from trilemma.techniques.distill.objective import DistillationLoss, divergence_and_likelihood
from trilemma.techniques.distill.student import (
    DistillSettings,
    cut_student,
    layer_parameters,
)
from trilemma.techniques.distill.teacher import KeptTeacher, OutsideTeacher, TorchTeacher
from trilemma.techniques.distill.windows import WindowBatches, pieces

KINDS = ("forward", "reverse", "skewed")


def softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def textbook(p: np.ndarray, q: np.ndarray, kind: str) -> np.ndarray:
    return {"forward": kl(p, q), "reverse": kl(q, p), "skewed": kl(p, 0.1 * p + 0.9 * q)}[kind]


def logits_of(random, rows: int, classes: int, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy((scale * random.standard_normal((rows, classes))).astype(np.float32))


def repetitive(vocab: int, windows: int, context: int, seed: int = 0) -> np.ndarray:
    """Text with something to learn: mostly cycles."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((windows, context)) < 0.9, 5, random.integers(0, vocab, (windows, context)))
    return (np.cumsum(steps, axis=1) % vocab).astype(np.int32)


# --- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_the_textbooks(kind, random_generator):
    teacher, student = (logits_of(random_generator, 13, 37) for _ in range(2))
    found = divergence(teacher.log_softmax(-1), student.log_softmax(-1), kind)
    np.testing.assert_allclose(found, textbook(softmax(teacher.numpy()), softmax(student.numpy()), kind), rtol=2e-5)
    same = divergence(teacher.log_softmax(-1), teacher.log_softmax(-1), kind)
    assert same.abs().max() < 1e-5


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(weight, kind, chunk, random_generator):
    rows, dim, vocab = 19, 11, 41
    hidden = torch.from_numpy(random_generator.standard_normal((rows, dim)).astype(np.float32)).requires_grad_()
    head = torch.from_numpy(random_generator.standard_normal((vocab, dim)).astype(np.float32)).requires_grad_()
    teacher = LogitRows(logits_of(random_generator, rows, vocab))
    targets = torch.from_numpy(random_generator.integers(0, vocab, rows))
    found = chunked_loss(hidden, head, mixed_loss(teacher, targets, weight, kind), chunk)
    (2 * found).backward()  # the factor must reach the gradients
    gradients = hidden.grad.clone(), head.grad.clone()

    hidden64, head64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    log_q = functional.linear(hidden64, head64).log_softmax(-1)
    log_p = teacher.logits.double().log_softmax(-1)
    sides = {
        "forward": lambda: functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True),
        "reverse": lambda: functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True),
        "skewed": lambda: functional.kl_div(
            (0.1 * log_p.exp() + 0.9 * log_q.exp()).log(), log_p, reduction="batchmean", log_target=True
        ),
    }
    wanted = weight * sides[kind]() + (1 - weight) * functional.nll_loss(log_q, targets)
    (2 * wanted).backward()
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0].double(), hidden64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1].double(), head64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 36])
def test_what_the_top_alone_misses_is_the_divergence_inside_the_rest(count, random_generator):
    """KL of all = KL of the top and the rest as one class + mass of the rest x KL inside the rest."""
    teacher, student = (logits_of(random_generator, 9, 37) for _ in range(2))
    top = teacher.log_softmax(-1).topk(count)
    coarse = TopRows(top.indices, top.values).divergence(slice(None), student.log_softmax(-1), "forward").numpy()
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    rest = np.ones_like(p, dtype=bool)
    np.put_along_axis(rest, top.indices.numpy(), values=False, axis=1)
    inside = np.empty(len(p))
    for row in range(len(p)):
        tail_p, tail_q = p[row][rest[row]], q[row][rest[row]]
        inside[row] = tail_p.sum() * kl(tail_p / tail_p.sum(), tail_q / tail_q.sum())
    np.testing.assert_allclose(coarse + inside, kl(p, q), rtol=1e-3, atol=2e-5)
    assert (coarse <= kl(p, q) + 2e-5).all()


# --- teachers ---------------------------------------------------------------------------------------------------


class Counting(TorchTeacher):
    asked = 0

    def rows(self, numbers, inputs):
        self.asked += len(numbers)
        return super().rows(numbers, inputs)


def test_a_kept_teacher_is_asked_once_a_window_and_says_the_same_again(tiny_model, tmp_path):
    model = tiny_model(seed=2)
    windows = repetitive(model.config.vocab_size, 7, 12)
    batches = WindowBatches(windows, 3, seed=1)
    teacher = Counting(Decoder.from_model(model))
    vocab = model.config.vocab_size

    def keep(identity="a", top=vocab):
        return KeptTeacher(teacher, (7, 11), vocab, top, tmp_path / "kept", identity)

    kept = keep()
    student = torch.randn(3 * 11, vocab, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for position in range(14):  # six epochs
        numbers, tokens = batches(position)
        whole = TorchTeacher(teacher.decoder).rows(numbers, tokens[:, :-1])
        found = kept.rows(numbers, tokens[:, :-1])
        torch.testing.assert_close(  # all tokens are kept, so only f16 is lost
            found.divergence(slice(None), student, "forward"), whole.divergence(slice(None), student, "forward"),
            rtol=5e-3, atol=5e-3,
        )  # fmt: skip
    assert teacher.asked == 7
    numbers, tokens = batches(0)
    again = keep().rows(numbers, tokens[:, :-1])
    assert torch.equal(again.top, kept.rows(numbers, tokens[:, :-1]).top)
    assert teacher.asked == 7
    keep(identity="another").rows(numbers, tokens[:, :-1])
    assert teacher.asked == 10


def test_logits_from_outside_count_like_the_modules_own(tiny_model):
    model = tiny_model(seed=4)
    decoder = Decoder.from_model(model).requires_grad_(False)
    batch = WindowBatches(repetitive(97, 5, 10), 5)(0)
    student = Decoder.from_model(tiny_model(seed=5))
    outside = OutsideTeacher(lambda windows: decoder(torch.from_numpy(windows)).numpy(), 97)
    one, other = DistillationLoss(TorchTeacher(decoder)), DistillationLoss(outside)
    torch.testing.assert_close(one(student, batch), other(student, batch))


# --- batches ----------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_window_once_under_its_own_number():
    windows = np.arange(60, dtype=np.int32).reshape(10, 6)
    batches = WindowBatches(windows, 5, seed=3)
    epochs = []
    for epoch in range(3):
        both = [batches(2 * epoch + part) for part in range(2)]
        numbers = torch.cat([numbers for numbers, _ in both])
        assert sorted(numbers.tolist()) == list(range(10))
        assert torch.equal(torch.cat([tokens for _, tokens in both]), torch.from_numpy(windows).long()[numbers])
        epochs.append(numbers.tolist())
    assert epochs[0] != epochs[1]
    with pytest.raises(DataError, match="at least two tokens"):
        WindowBatches(np.zeros((3, 1), np.int32), 2)
    np.testing.assert_array_equal(pieces(windows, 4), windows[:, :4])
    assert pieces(windows, 3).shape == (20, 3)


# --- students ---------------------------------------------------------------------------------------------------


def calibrated(model, windows=24, context=24, **more) -> Build:
    return Build(calibration=repetitive(model.config.vocab_size, windows, context), seed=1, threads=1, **more)


@pytest.mark.parametrize("settings", [{}, {"keep_top": 48}, {"precision": "bf16", "optimizer": "adamw"}])
def test_a_student_comes_closer_to_its_teacher(settings, tiny_model):
    model = tiny_model(seed=7, ffn=96)
    how = DistillSettings.model_validate({"steps": 40, "context": 24, "learning_rate": 5e-3, **settings})
    build = calibrated(model)
    start = cut_student(model, how, build)
    recipe = Recipe(seed=1, steps=(Step(technique="distill", settings=how.model_dump()),))
    learned = apply_recipe(model, recipe, build)
    assert learned.config == start.config
    assert layer_parameters(learned.config) <= 0.52 * layer_parameters(model.config)
    batches = [WindowBatches(repetitive(97, 8, 24, seed=99), 8)(0)]
    teacher = TorchTeacher(Decoder.from_model(model))
    before, after = (
        divergence_and_likelihood(Decoder.from_model(m), teacher, batches)[0] for m in (start, learned)
    )  # fmt: skip
    assert after < 0.85 * before


def test_stopped_and_resumed_is_the_same_to_the_bit(tiny_model, tmp_path):
    model = tiny_model(seed=8)
    student = cut_student(model, DistillSettings(), calibrated(model))
    how = HealSettings.model_validate({"steps": 9, "context": 24, "keep_top": 6})
    whole = Lesson(student, model, how, calibrated(model, work=tmp_path / "whole")).learn("heal")

    def stop(done, total, what):
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError, match="step 4 of 9"):
        Lesson(student, model, how, calibrated(model, work=tmp_path / "two", progress=stop)).learn("heal")
    resumed = Lesson(student, model, how, calibrated(model, work=tmp_path / "two")).learn("heal")
    for name in whole:
        np.testing.assert_array_equal(resumed.tensor(name), whole.tensor(name), err_msg=name)


def test_healing_can_leave_the_matrices_alone(tiny_model):
    model = tiny_model(seed=9)
    hurt = model.with_tensors({"layers.0.ffn.down.weight": model.tensor("layers.0.ffn.down.weight") * 0.5})
    how = HealSettings.model_validate({"steps": 4, "context": 24, "trained": "vectors"})
    healed = Lesson(hurt, model, how, calibrated(model)).learn("heal")
    for name, shape in model.config.tensor_shapes().items():
        same = np.array_equal(healed.tensor(name), hurt.tensor(name))
        assert same == (len(shape) == 2), name


def test_experts_heal_too(experts_config, random_model):
    model = random_model(experts_config(shared_hidden=20), 3)
    random = np.random.default_rng(1)
    hurt = model.with_tensors({
        name: model.tensor(name) * (1 + 0.5 * random.standard_normal(shape).astype(np.float32))
        for name, shape in model.config.tensor_shapes().items() if "experts" in name
    })  # fmt: skip
    how = HealSettings.model_validate({"steps": 20, "context": 24})
    healed = Lesson(hurt, model, how, calibrated(model)).learn("heal")
    batches = [WindowBatches(repetitive(model.config.vocab_size, 8, 24, seed=99), 8)(0)]
    teacher = TorchTeacher(Decoder.from_model(model))
    before, after = (divergence_and_likelihood(Decoder.from_model(m), teacher, batches)[0] for m in (hurt, healed))
    assert after < 0.8 * before
    assert not np.array_equal(healed.tensor("layers.0.ffn.router.weight"), hurt.tensor("layers.0.ffn.router.weight"))


def test_packed_weights_and_missing_text_are_refused(tiny_model):
    model = tiny_model(seed=9)
    packed = TECHNIQUES.get("rtn")()
    quantized = packed.apply(model, packed.Settings(weights="int8-g32"), Build())
    heal, distill = TECHNIQUES.get("heal")(), TECHNIQUES.get("distill")()
    with pytest.raises(RecipeError, match="heal before you quantize"):
        heal.apply(quantized, heal.Settings(), calibrated(model))
    with pytest.raises(RecipeError, match="compress the student"):
        distill.apply(quantized, distill.Settings(), calibrated(model))
    for technique in (heal, distill):
        with pytest.raises(RecipeError, match="text"):
            technique.apply(model, technique.Settings(), Build())
    with pytest.raises(RecipeError, match="same tokenizer"):
        heal.apply(model, heal.Settings(), calibrated(model, original=tiny_model(vocab=50)))


def test_depth_and_width_together_leave_the_share_asked_for(tiny_model):
    model = tiny_model(seed=12, layers=4, ffn=160)
    how = DistillSettings.model_validate({"shrink": 0.6, "layers": 3})
    student = cut_student(model, how, calibrated(model))
    assert len(student.config.layers) == 3
    assert 0.3 < layer_parameters(student.config) / layer_parameters(model.config) <= 0.41
    with pytest.raises(RecipeError, match="Keep more layers"):
        cut_student(model, DistillSettings.model_validate({"shrink": 0.2, "layers": 1}), calibrated(model))
    with pytest.raises(RecipeError, match="4 layers"):
        cut_student(model, DistillSettings.model_validate({"layers": 9}), calibrated(model))


def test_full_rows_make_their_logits_from_hidden_states(random_generator):
    hidden, head = logits_of(random_generator, 5, 8), logits_of(random_generator, 21, 8)
    torch.testing.assert_close(
        FullRows(hidden, head).log_probs(slice(1, 4)), LogitRows(hidden @ head.T).log_probs(slice(1, 4))
    )
