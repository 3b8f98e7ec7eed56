"""`trilemma lm-eval`: lm-eval's own command line, with our engines as one of its models."""

from __future__ import annotations

import typer

# Everything after the first argument is lm-eval's, its --help included.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def lm_eval(context: typer.Context) -> None:
    """lm-eval's command line with `--model trilemma --model_args path=...` known to it; all options are its own."""
    from trilemma.integrations.lm_eval import main

    main(context.args)
