"""A torch device that is none: its tensors lie on the CPU, but whoever mixes them with others is caught, as on a GPU.

Techniques are told where to work (`Build.device`). Whether everything of theirs really goes there, and comes back
before numpy sees it, shows only on another device; where none is at hand this one takes its place. It computes what
the CPU computes, so results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
_MOVES = {"_to_copy", "copy_", "copy", "_copy_from"}
_FACTORIES = (  # else they resize what they were given, or take a way that torch has for none but its own devices
    "empty.memory_format", "empty_strided", "_to_copy", "arange", "arange.start", "arange.start_step", "eye", "eye.m",
)  # fmt: skip
_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU takes indices from the CPU too


class PretendTensor(Tensor):
    """A tensor that says it is on the device; `held` is where its values lie."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=f"{NAME}:0", requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Says to `Module.to` that a parameter must be exchanged as a whole."""
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Mapping[str, Tensor], *_: Any) -> PretendTensor:
        return cls(inner["held"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return return_and_correct_aliasing(func, args, kwargs or {}, _run(func, args, dict(kwargs or {})))


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operation on what its arguments hold; the result lies where the operation would have put it."""
    name = func._schema.name.removeprefix("aten::")
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    here = [each for each in given if isinstance(each, PretendTensor)]
    others = [each for each in given if not isinstance(each, PretendTensor) and each.ndim and each.device.type == "cpu"]
    if here and others and name not in _MOVES | _CPU_INDICES:
        raise RuntimeError(
            f"{name} got tensors on {NAME}:0 and on the CPU, of shapes {[tuple(e.shape) for e in given]}"
        )
    goal = kwargs.get("device")
    goes = bool(here) if goal is None else torch.device(goal).type == NAME
    if goal is not None:
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    found = func(*tree_map(_held, tuple(args)), **tree_map(_held, kwargs))
    stale = [each for each in here if each.shape != each.held.shape]
    assert not stale, f"{func} resized what it was given; add it to the factories"
    if name == "copy_" or not goes:
        return args[0] if name == "copy_" else found
    return tree_map(lambda value: PretendTensor(value) if isinstance(value, Tensor) else value, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


class _Module(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        """No random numbers are drawn there."""


@cache
def install() -> str:
    """Makes the device known to torch, once a process; its name."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _LIBRARIES[0].fallback(_fallback, "PrivateUse1")
    for name in _FACTORIES:
        packet, overload = [*name.split("."), "default"][:2]
        operation = getattr(getattr(torch.ops.aten, packet), overload)
        _LIBRARIES[1].impl(name, partial(_fallback, operation), "PrivateUse1")
    return NAME


def _fallback(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Operations without a tensor of ours among their arguments: those that make one."""
    return _run(func, args, kwargs)


_LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")  # what they say ends with them
