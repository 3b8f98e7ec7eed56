"""The energy estimate beside what others measured: the fit of its constants, and the held-out cases.

    python benchmarks/energy_estimator.py

Fits the power of a busy core and the interval's factor on the cases marked 'fit' in `trilemma/devices/
published_energy.yaml`, compares them with the shipped constants (`energy_classes.yaml`), and sets every case beside its
estimate. Exit code 1 when the shipped constants are not those of the fit, or a held-out case lies outside.
"""

from __future__ import annotations

import sys

from trilemma.core.quantity import significant
from trilemma.measure.energy.energy_model import DEVICES
from trilemma.measure.energy.published import PublishedCase, fit, read_published

HEADERS = (
    "class", "machine", "model", "used to", "J a token, estimated", "published", "ratio", "interval x/÷", "inside",
)  # fmt: skip


def row(case: PublishedCase) -> tuple[list[str], bool]:
    constants = DEVICES[case.device_class]
    guess = case.estimate(constants)
    ratio = guess / case.j_per_token
    inside = 1 / constants.factor <= ratio <= constants.factor
    cells = [case.device_class, case.machine, case.model, case.use, significant(guess), significant(case.j_per_token)]
    return [*cells, f"{ratio:.2f}", f"{constants.factor:g}", "yes" if inside else "NO"], inside


def main() -> int:
    published = read_published()
    fine = True
    for name, fitted in fit(published, DEVICES).items():
        shipped = DEVICES[name]
        same = abs(shipped.core_w / fitted.core_w - 1) < 0.03 and fitted.factor <= shipped.factor < fitted.factor + 0.11
        fine &= same
        print(
            f"{name}: {fitted.machines} machines, fitted core_w {fitted.core_w:.3f} W, factor {fitted.factor:.3f}; "
            f"shipped {shipped.core_w} W, {shipped.factor}{'' if same else '  DIFFERS'}"
        )
    rows = [row(case) for case in published.cases]
    fine &= all(inside for (_, inside), case in zip(rows, published.cases, strict=True) if case.use == "check")
    table = [list(HEADERS), ["---"] * len(HEADERS), *(cells for cells, _ in rows)]
    print("\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in table))
    print(f"\n{'All held-out cases lie inside.' if fine else 'NOT as stated.'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
