"""Trials and measurements with made-up numbers, for tests of pure logic and of the report."""

from trilemma.core.measurement import Measurement
from trilemma.core.recipe import Recipe, Step
from trilemma.core.trial import Trial


def measured(metric, value, half=None, samples=(), n=10, source="measured", noisy=False):
    interval = None if half is None else (value - half, value + half)
    return Measurement.of(metric, value, ci95=interval, samples=samples, n=n, source=source, noisy=noisy)


def trial(name, *, weights=None, tpot=None, kl=None, ppl=None, status="measured", half=0.0005):
    found = {}
    if weights is not None:
        found["weights_bytes"] = measured("weights_bytes", weights)
    if tpot is not None:
        found["tpot_s"] = measured("tpot_s", tpot, 2e-5)
    if kl is not None:
        found["kl_mean"] = measured("kl_mean", kl, kl / 20)
    if ppl is not None:
        found["ppl_increase"] = measured("ppl_increase", ppl, half)
    recipe = Recipe(name=name, steps=(Step(technique="rtn", settings={"name": name}),) if status != "baseline" else ())
    return Trial(name=name, recipe=recipe, status=status, measurements=found)


BASELINE = trial("baseline", weights=14e6, tpot=2e-3, kl=1e-5, ppl=0.0, status="baseline", half=1e-5)
INT8 = trial("W8A8", weights=7e6, tpot=1.4e-3, kl=4e-4, ppl=0.001)
INT4_G32 = trial("W4A8-g32", weights=4.4e6, tpot=1.0e-3, kl=9e-3, ppl=0.012)
INT4_G128 = trial("W4A8-g128", weights=3.9e6, tpot=0.95e-3, kl=3e-2, ppl=0.03)
ALL = [BASELINE, INT8, INT4_G32, INT4_G128]
