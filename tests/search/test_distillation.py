"""`distill` from end to end on a tiny checkpoint: what it leaves, stopping and going on, replaying, refusing."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from trilemma import compress, distill
from trilemma.cli.distill import curve_plot, read_share
from trilemma.core.errors import CheckpointError, DataError, InputError, OutputError, RecipeError, StoppedError
from trilemma.data.documents import Document
from trilemma.data.split import hold_out
from trilemma.formats.artifact import load_any, read_artifact, read_recipe
from trilemma.techniques.training import read_curve

SETTINGS = {"steps": 6, "context": 32, "batch_size": 2}


def run(tiny_checkpoint, tiny_text, output, **more):
    how = {"data": tiny_text, "settings": SETTINGS, "seed": 2, "threads": 1, **more}
    return distill(tiny_checkpoint.path, output, **how)


def weights(path):
    model = read_artifact(path)
    return {name: model.tensor(name) for name in model}


@pytest.fixture(scope="module")
def done(tiny_checkpoint, tiny_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("distilled") / "student"
    return output, run(tiny_checkpoint, tiny_text, output)


def test_it_leaves_a_student_with_its_evidence(done, tiny_checkpoint):
    output, report = done
    student, teacher = read_artifact(output), load_any(tiny_checkpoint.path)
    assert report.student_layer_parameters <= 0.52 * report.teacher_layer_parameters
    assert [row.name for row in report.rows] == ["teacher", "student before", "student after"]
    before, after = (row.measurements["kl_mean"].value for row in report.rows[1:])
    assert after < before
    assert report.build["build_s"].value > 0
    assert report.steps == 6
    assert student.config.layers != teacher.config.layers
    assert student.format_of("layers.0.ffn.up.weight") == "bf16"
    assert (output / "tokenizer.json").is_file()
    assert [point.step for point in read_curve(output)] == [point.step for point in report.curve]
    assert report.curve[0].validation_loss > report.curve[-1].validation_loss
    assert not output.with_name("student.training").exists()
    assert "FFN channels 96 -> " in report.cut
    assert curve_plot(report).startswith("<svg")


def test_stopped_it_goes_on_and_ends_in_the_same_bits(done, tiny_checkpoint, tiny_text, tmp_path):
    output, _ = done
    again = tmp_path / "student"

    def stop(finished, total, what):
        if what.startswith("distill: step 3"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError, match="goes on from there"):
        run(tiny_checkpoint, tiny_text, again, progress=stop)
    assert not again.exists()
    run(tiny_checkpoint, tiny_text, again)
    for name, values in weights(output).items():
        np.testing.assert_array_equal(weights(again)[name], values, err_msg=name)


def test_its_recipe_makes_the_same_student_again(done, tiny_checkpoint, tiny_text, tmp_path):
    output, _ = done
    recipe = read_recipe(output)
    compress(tiny_checkpoint.path, tmp_path / "again", recipe=recipe, data=[tiny_text], threads=1)
    wanted, made = weights(output), weights(tmp_path / "again")
    for name in wanted:
        np.testing.assert_array_equal(made[name], wanted[name], err_msg=name)


def test_a_given_time_decides_the_steps(tiny_checkpoint, tiny_text, tmp_path):
    report = run(tiny_checkpoint, tiny_text, tmp_path / "s", settings={"context": 32, "batch_size": 2}, time="1s")
    assert report.steps >= 1
    assert report.recipe.steps[0].settings["steps"] == report.steps


def test_bad_input_is_refused_and_nothing_is_left(done, tiny_checkpoint, tiny_text, tmp_path):
    output, _ = done
    with pytest.raises(OutputError, match="--force"):
        run(tiny_checkpoint, tiny_text, output)
    with pytest.raises(InputError, match="time"):
        run(tiny_checkpoint, tiny_text, tmp_path / "a", time="soon")
    with pytest.raises(RecipeError, match="shrink"):
        run(tiny_checkpoint, tiny_text, tmp_path / "a", shrink=1.5)
    with pytest.raises(RecipeError, match="2 layers"):
        run(tiny_checkpoint, tiny_text, tmp_path / "a", layers=5)
    with pytest.raises(DataError, match="does not exist"):
        run(tiny_checkpoint, tmp_path / "none.txt", tmp_path / "a")
    with pytest.raises(CheckpointError, match="trained weights"):
        run(type(tiny_checkpoint)(tiny_checkpoint.path / "config.json", tiny_checkpoint.tokenizer), tiny_text,
            tmp_path / "a")  # fmt: skip
    assert not list(tmp_path.iterdir())
    for text in ("0", "100%", "half", "-3%", "nan"):
        with pytest.raises(InputError, match="--shrink"):
            read_share(text)
    assert read_share("25%") == read_share("0.25") == 0.25


def test_held_out_documents_share_no_text_with_the_others(random_generator):
    words = [f"w{number}" for number in range(3000)]
    texts = [" ".join(random_generator.choice(words, 200)) for _ in range(20)]
    documents = [Document(text, "d", str(at)) for at, text in enumerate([*texts, *texts[:5]])]  # five exact copies
    documents.append(Document(texts[3] + " and a little more", "d", "near"))
    for seed in range(5):
        training, held_out = hold_out(documents, seed)
        assert len(held_out) >= 3
        near = {"3", "near"} & {item.source for item in held_out}
        assert not near or not {"3", "near"} & {item.source for item in training}
        assert not {item.text for item in training} & {item.text for item in held_out}
        assert hold_out(documents, seed) == (training, held_out)
    with pytest.raises(DataError, match="at least 6"):
        hold_out(documents[:5])
