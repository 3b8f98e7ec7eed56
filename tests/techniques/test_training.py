"""The training loop: resumes bit for bit, stops cleanly, learns; its parts against independent oracles."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from trilemma.core.errors import CheckpointError, DataError, OutputError, TrainingError
from trilemma.techniques.training import (
    CURVE_FILE,
    STATE_FILE,
    TokenStream,
    TrainingSettings,
    learning_rate_at,
    make_optimizers,
    mean_loss,
    next_token_loss,
    read_curve,
    seconds_per_step,
    train,
)
from trilemma.techniques.training.muon import COEFFICIENTS, Muon, orthogonalize

VOCAB = 23


class TinyModel(nn.Module):
    """A bigram model with a hidden layer, dropout (so that random state matters) and tied weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, 12)
            self.inner = nn.Linear(12, 12)
            self.norm = nn.LayerNorm(12)
            self.head = nn.Linear(12, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.embedding.weight.data.mul_(0.2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.dropout(torch.relu(self.inner(x)))))


def tokens(n: int = 600, seed: int = 3) -> np.ndarray:
    """A noisy cycle: the next token is usually the present one plus 5."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random(n) < 0.9, 5, random.integers(0, VOCAB, n))
    return (np.cumsum(steps) % VOCAB).astype(np.uint16)


def settings(**changes) -> TrainingSettings:
    base = {
        "steps": 12, "batch_size": 3, "context": 9, "learning_rate": 0.02, "threads": 1, "seed": 5,
        "checkpoint_every": 4, "eval_every": 5, "log_every": 2, "optimizer": "muon", "accumulate": 2,
    }  # fmt: skip
    return TrainingSettings(**{**base, **changes})


def run(folder: Path | None, how: TrainingSettings, loss=next_token_loss, model: nn.Module | None = None, **more):
    model = model or TinyModel()
    stream = TokenStream(tokens(), how.batch_size, how.context, seed=1)
    held_out = TokenStream(tokens(seed=4), 8, how.context)
    result = train(
        model, stream, loss, how, folder=folder, validate=mean_loss(next_token_loss, [held_out(0)], how), **more
    )
    return model, result


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def slow_loss(model, batch):
    time.sleep(0.05)
    return next_token_loss(model, batch)


def run_until_killed(folder: str) -> None:
    """What the process that gets killed does."""
    run(Path(folder), settings(steps=400, checkpoint_every=3), loss=slow_loss)


# --- the loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_it_learns(optimizer, precision, tmp_path):
    how = settings(steps=150, optimizer=optimizer, precision=precision, accumulate=1)
    _, result = run(tmp_path, how)
    first, last = result.curve[0], result.curve[-1]
    assert first.step == 0
    assert first.train_loss is None
    assert abs(first.validation_loss - math.log(VOCAB)) < 1.5  # untrained: nearly uniform
    # 0.9 of the steps are certain: the best possible is about 0.63 nats.
    assert 0.5 < last.validation_loss < 1.3
    assert result.validation_loss == last.validation_loss
    assert result.finish == "steps"
    assert result.tokens == last.tokens == 150 * 3 * 9


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    how = settings(steps=400, checkpoint_every=3)
    whole, plain = run(tmp_path / "whole", how)
    folder = tmp_path / "killed"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_training as t; "
    process = subprocess.Popen([sys.executable, "-c", code + f"t.run_until_killed({str(folder)!r})"])
    deadline = time.monotonic() + 60
    while not (folder / STATE_FILE).exists() or len(read_curve(folder)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = read_curve(folder)[-1].step
    with (folder / CURVE_FILE).open("a") as curve:
        curve.write('{"step": 99, "sec')  # as if the kill had cut a line
    first_steps = []
    resumed, result = run(folder, how, progress=lambda told: first_steps.append(told.step))
    assert 1 < first_steps[0] <= killed_at + 3 < 400
    assert_same_bits(weights(whole), weights(resumed))
    timeless = [point.model_copy(update={"seconds": 0}) for point in result.curve]
    assert timeless == [point.model_copy(update={"seconds": 0}) for point in plain.curve]
    assert read_curve(folder) == result.curve


def test_other_seed_gives_other_bits(tmp_path):
    first, _ = run(None, settings())
    again, _ = run(None, settings())
    other, _ = run(None, settings(seed=6))
    assert_same_bits(weights(first), weights(again))
    assert not torch.equal(first.inner.weight, other.inner.weight)


def test_time_limit_stops_and_resumes_to_the_same_bits(tmp_path):
    whole, _ = run(None, settings())
    folder, finishes = tmp_path / "timed", []
    while not finishes or finishes[-1] == "time":
        model, result = run(folder, settings(time_limit_s=0.12), loss=slow_loss)
        finishes.append(result.finish)
    assert len(finishes) > 2
    assert finishes[-1] == "steps"
    assert_same_bits(weights(whole), weights(model))
    assert result.seconds > 1.2  # all runs together: 24 losses of 0.05 s


def test_a_finished_run_is_not_run_again(tmp_path):
    model, result = run(tmp_path, settings())
    again, second = run(tmp_path, settings(), loss=lambda module, batch: pytest.fail("trained again"))
    assert_same_bits(weights(model), weights(again))
    assert second.curve == result.curve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_with_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)

    def interrupt(told):
        if told.step == 5:
            os.kill(os.getpid(), number)

    _, result = run(tmp_path, settings(checkpoint_every=0), progress=interrupt)
    assert signal.getsignal(number) is before
    assert result.finish == "interrupted"
    assert result.step in (5, 6)
    with safe_open(tmp_path / STATE_FILE, "pt") as file:
        assert json.loads(file.metadata()["training"])["step"] == result.step
    whole, _ = run(None, settings(checkpoint_every=0))
    resumed, _ = run(tmp_path, settings(checkpoint_every=0))
    assert_same_bits(weights(whole), weights(resumed))


def test_a_second_interrupt_stops_at_once(tmp_path):
    def impatient(module, batch):
        signal.raise_signal(signal.SIGINT)
        return next_token_loss(module, batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without one
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, settings(), loss=impatient)
    finally:
        signal.signal(signal.SIGINT, before)


def test_trains_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(None, settings())))
    thread.start()
    thread.join()
    main, _ = run(None, settings())
    assert_same_bits(weights(main), weights(results[0][0]))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_is_an_error_and_keeps_the_checkpoint(tmp_path, what):
    count = 0

    def spoilt(module, batch):
        nonlocal count
        count += 1
        loss = next_token_loss(module, batch)
        if count <= 2 * 6:
            return loss
        # sqrt has an infinite gradient at 0, so the second kind is finite in value only.
        return loss * math.nan if what == "loss" else loss + torch.sqrt((module.inner.weight * 0).sum())

    with pytest.raises(TrainingError, match=r"Step 7 of 12.*must be finite.*checkpoint of step 4") as caught:
        run(tmp_path, settings(), loss=spoilt)
    assert "learning rate" in str(caught.value)
    healed, _ = run(tmp_path, settings())
    whole, _ = run(None, settings())
    assert_same_bits(weights(whole), weights(healed))


def test_resume_refuses_other_settings_data_and_models(tmp_path):
    run(tmp_path, settings(time_limit_s=0.01), loss=slow_loss)
    with pytest.raises(CheckpointError, match=r"learning_rate 0.02 -> 0.5"):
        run(tmp_path, settings(learning_rate=0.5))
    with pytest.raises(CheckpointError, match="data 600 tokens"):
        train(TinyModel(), TokenStream(tokens(500), 3, 9), next_token_loss, settings(), folder=tmp_path)
    wide = TinyModel()
    wide.inner = nn.Linear(12, 13)
    with pytest.raises(CheckpointError, match=r"module.inner.weight.*another model"):
        run(tmp_path, settings(), model=wide)
    run(tmp_path, settings(log_every=5, checkpoint_every=1, eval_every=2))  # these may change


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, settings())
    whole = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path, settings())


def test_a_pickle_is_never_run(tmp_path):
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"weights": Trap()}, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError):
        run(tmp_path, settings())
    assert not marker.exists()


def test_a_checkpoint_that_can_not_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    run(tmp_path, settings(time_limit_s=0.01), loss=slow_loss)
    kept = (tmp_path / STATE_FILE).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trilemma.techniques.training.state.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        run(tmp_path, settings())
    assert (tmp_path / STATE_FILE).read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STATE_FILE, CURVE_FILE])


def test_accumulation_equals_one_large_batch():
    small = settings(steps=3, batch_size=2, accumulate=4, optimizer="adamw")
    large = settings(steps=3, batch_size=8, accumulate=1, optimizer="adamw")
    results = []
    for how in (small, large):
        model = TinyModel().double()
        model.dropout.p = 0.0
        train(model, TokenStream(tokens(), how.batch_size, how.context, seed=1), next_token_loss, how)
        results.append(model)
    assert torch.allclose(results[0].inner.weight, results[1].inner.weight, atol=1e-6)


def test_frozen_parameters_stay_and_all_frozen_is_an_error():
    model = TinyModel()
    model.embedding.weight.requires_grad_(False)
    before = weights(model)
    run(None, settings(), model=model)
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(model.inner.weight, before["inner.weight"])
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        run(None, settings(), model=model)


def test_surroundings_are_left_as_they_were():
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    torch.set_num_threads(2)  # another number than training takes
    model = TinyModel().eval()
    run(None, settings(), model=model)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 2
    assert not model.training


def test_progress_counts_and_estimates():
    told = []
    run(None, settings(), loss=slow_loss, progress=told.append)
    assert [one.step for one in told] == list(range(1, 13))
    assert told[5].tokens == 6 * 2 * 3 * 9
    assert 0.4 < told[5].seconds_left < 20  # 6 steps of 2 losses of 0.05 s
    assert told[-1].seconds_left == 0


def test_seconds_per_step_leaves_the_model_alone():
    model = TinyModel()
    before = weights(model)
    how = settings()
    taken = seconds_per_step(model, TokenStream(tokens(), 3, 9), slow_loss, how)
    assert 0.1 <= taken < 5
    assert_same_bits(before, weights(model))


# --- optimizers and schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (5, 19), (33, 8), (1, 6)])
def test_orthogonalize_against_svd(shape):
    random = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=random, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    # The oracle: the iteration acts on singular values alone, as a scalar polynomial.
    values = s / matrix.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalize(matrix)
    assert found.shape == matrix.shape
    assert found.dtype == matrix.dtype
    assert torch.allclose(found, u @ torch.diag(values) @ vt, atol=2e-4)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vt).flatten(), dim=0) > 0.97
    assert torch.linalg.svdvals(orthogonalize(matrix, steps=8)).sub(1).abs().max() < 0.4


def test_muon_step_by_hand():
    random = torch.Generator().manual_seed(2)
    start, first, second = (torch.randn(6, 10, generator=random) for _ in range(3))
    parameter = nn.Parameter(start.clone())
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
    expected, momentum = start, torch.zeros_like(start)
    for gradient in (first, second):
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalize(0.1 * gradient + 0.9 * momentum)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * 0.2 * math.sqrt(10) * update
    assert torch.allclose(parameter, expected, atol=1e-6)
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_parameters_are_sorted_to_optimizers():
    model = TinyModel()
    muon, adamw = make_optimizers(model, settings(optimizer="muon", weight_decay=0.3))
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model.inner.weight)]
    decayed, plain = adamw.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]  # tied: once
    assert {p.ndim for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    (alone,) = make_optimizers(model, settings(optimizer="adamw"))
    assert sum(len(group["params"]) for group in alone.param_groups) == 5


def test_schedules():
    cosine = settings(steps=100, learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.25, schedule="cosine")
    rates = [learning_rate_at(cosine, step) for step in range(100)]
    assert rates[0] == pytest.approx(2 / 11)
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert rates[99] == pytest.approx(0.5, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    wsd = cosine.model_copy(update={"schedule": "wsd", "decay_fraction": 0.4})
    rates = [learning_rate_at(wsd, step) for step in range(100)]
    assert rates[10:61] == [2.0] * 51
    assert rates[80] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    constant = cosine.model_copy(update={"schedule": "constant", "warmup_fraction": 0.0})
    assert {learning_rate_at(constant, step) for step in range(100)} == {2.0}


# --- data -------------------------------------------------------------------------------------------------------


def test_each_epoch_holds_each_window_once():
    flat = np.arange(103, dtype=np.uint32)
    stream = TokenStream(flat, batch_size=3, context=10, seed=9)
    assert stream.windows == 9
    starts_of_epochs = []
    for epoch in range(4):
        rows = torch.cat([stream(position) for position in range(3 * epoch, 3 * epoch + 3)])
        assert torch.equal(rows - rows[:, :1], torch.arange(11).expand(9, 11))  # contiguous windows
        starts = rows[:, 0].tolist()
        assert len({start % 10 for start in starts}) == 1
        assert sorted(starts) == list(range(min(starts), min(starts) + 90, 10))
        starts_of_epochs.append(tuple(starts))
    assert len(set(starts_of_epochs)) == 4
    assert torch.equal(TokenStream(flat, 3, 10, seed=9)(7), stream(7))
    assert not torch.equal(TokenStream(flat, 3, 10, seed=8)(7), stream(7))


def test_a_stream_over_a_memory_map(tmp_path):
    flat = tokens(1000)
    flat.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    a, b = TokenStream(flat, 2, 16), TokenStream(mapped, 2, 16)
    assert a.identity == b.identity
    assert a(0).dtype == torch.int64
    assert torch.equal(a(11), b(11))
    assert TokenStream(tokens(1000, seed=8), 2, 16).identity != a.identity


def test_too_few_tokens():
    with pytest.raises(DataError, match="at least 10 tokens"):
        TokenStream(np.arange(9), 1, 9)
    assert torch.equal(TokenStream(np.arange(10), 1, 9)(5), torch.arange(10)[None])
