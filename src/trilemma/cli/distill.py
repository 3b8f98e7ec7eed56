"""`trilemma distill`: a small student out of a large teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trilemma.cli import options

if TYPE_CHECKING:
    from trilemma.search.distillation import DistillReport


def distill(
    teacher: Annotated[
        str, typer.Option("--teacher", help="Model to learn from, and to cut the student from: a folder or hub id.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the student.")],
    data: options.Data = None,
    shrink: Annotated[
        str, typer.Option("--shrink", help="Share of the weights inside layers that goes: 50%, or 0.5.")
    ] = "50%",
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Layers that the student keeps; all by default (cut in width)."),
    ] = None,
    time: Annotated[
        str, typer.Option("--time", help="For cutting and training, the teacher's part included: 90s, 10m, 1h.")
    ] = "10m",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps, instead of --time.")] = None,
    teacher_weight: Annotated[
        float, typer.Option("--teacher-weight", help="1: the teacher's answers alone; 0: the text's own tokens alone.")
    ] = 1.0,
    divergence: Annotated[
        Literal["forward", "reverse", "skewed"],
        typer.Option("--divergence", help="Which KL to the teacher is trained on."),
    ] = "forward",
    keep_top: Annotated[
        int,
        typer.Option(
            "--keep-top", min=0, help="Keep so many likeliest tokens of the teacher for later epochs; 0 keeps none."
        ),
    ] = 0,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate; the technique's own by default.")
    ] = None,
    precision: Annotated[
        Literal["f32", "bf16"], typer.Option("--precision", help="Of the products while training; weights stay f32.")
    ] = "f32",
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the learning curve there, as SVG.")] = None,
    prepare: options.PrepareText = "none",
    seed: options.Seed = 0,
    threads: options.Threads = None,
    device: options.TorchDevice = "cpu",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Cut a student out of a teacher and train it on the teacher's answers; the same command resumes after Ctrl-C."""
    from trilemma.cli import console
    from trilemma.report.plot import check_plot_path, write_plot
    from trilemma.search.distillation import distill as run

    check_plot_path(plot)
    settings: dict[str, Any] = {
        "teacher_weight": teacher_weight, "divergence": divergence, "keep_top": keep_top, "precision": precision,
    }  # fmt: skip
    settings |= {} if steps is None else {"steps": steps}
    settings |= {} if learning_rate is None else {"learning_rate": learning_rate}
    with console.progress("distill") as update:
        report = run(
            teacher, output, data=data or [], shrink=read_share(shrink), layers=layers, time=time, settings=settings,
            prepare=prepare, seed=seed, threads=threads, device=device, force=force, progress=update,
        )  # fmt: skip
    if plot is not None:
        write_plot(plot, curve_plot(report))
    if json:
        console.print_json(report)
    else:
        show_report(report)


def read_share(text: str) -> float:
    """'50%' or '0.5' as 0.5. Raises InputError for anything that is not above 0 and below 1."""
    from trilemma.core.errors import InputError

    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"Can not read --shrink '{text}'. Expected a share between 0 and 100%, such as 50% or 0.5.")
    return share


def show_report(report: DistillReport) -> None:
    """What was cut, what training took, and the quality of teacher and student, on stdout."""
    from trilemma.cli import console

    gone = 1 - report.student_layer_parameters / report.teacher_layer_parameters
    typer.echo(
        f"{report.output}: {report.student_parameters / 1e6:.2f}M parameters of {report.teacher_parameters / 1e6:.2f}M "
        f"({gone:.0%} of those inside layers are gone: {report.cut})"
    )
    typer.echo(
        f"{report.steps} steps, {report.tokens:,} tokens of {report.training_windows:,} windows, built in "
        f"{console.show(report.build['build_s'])} with {console.show(report.build['build_energy_j'])}"
    )
    metrics = ("perplexity", "kl_mean", "top1_agreement")
    rows = [[row.name, *(console.show(row.measurements.get(metric)) for metric in metrics)] for row in report.rows]
    console.table(f"On {report.held_out_documents} held-out documents", ["model", *metrics], rows)


def curve_plot(report: DistillReport) -> str:
    """Loss while training and on held-out text against time, as SVG."""
    from trilemma.report.plot import Point, Series, line_chart

    training = [Point(p.seconds, p.train_loss) for p in report.curve if p.train_loss is not None]
    held_out = [Point(p.seconds, p.validation_loss) for p in report.curve if p.validation_loss is not None]
    weight = report.recipe.steps[0].settings["teacher_weight"]
    label = {1.0: "KL to the teacher, nats a token", 0.0: "cross-entropy, nats a token"}.get(
        weight, "loss, nats a token"
    )
    series = [Series("training text", training), Series("held-out text", held_out)]
    return line_chart(
        [line for line in series if line.points], "training time, teacher included", label, x_unit="s",
        title="The student learns", log_y=weight == 1.0,
    )  # fmt: skip
