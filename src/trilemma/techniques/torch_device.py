"""The torch device that techniques compute on, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trilemma.core.errors import InputError, MissingExtraError

_KNOWN = "Give cpu, cuda or, of several GPUs, cuda:1."


def check_device(name: str) -> str:
    """`name`, if torch can compute there: cpu, cuda, cuda:1.

    torch is asked only about other devices than the CPU, so that what needs no torch works without it.

    Raises:
        InputError: no such kind of device, or none (or not so many) of that kind here.
        MissingExtraError: a device other than the CPU, and torch is not installed.
    """
    if name == "cpu":
        return name
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "compress", f"Computing on '{name}'") from None
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise InputError(f"torch knows no device '{name}'. {_KNOWN}") from None
    if kind == "meta":
        raise InputError(f"Tensors on the device 'meta' have no values. {_KNOWN}")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise InputError(
            f"The device '{name}' can not be used: {reason}. torch {torch.__version__} finds {', '.join(here)} here; "
            "give one of these, or install a build of torch for yours."
        ) from None
    return name


@contextmanager
def within_memory(name: str, what: str) -> Iterator[None]:
    """Raises InputError where the device `name` has too little memory for `what`; the CPU's is the system's affair."""
    if name == "cpu":
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The device '{name}' has too little memory for {what}: {str(error).split('. ')[0]}. "
            "Free some, use another device or cpu; what was finished is kept where the step can resume."
        ) from None
