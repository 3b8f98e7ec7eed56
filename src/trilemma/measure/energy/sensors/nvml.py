"""NVIDIA GPUs through NVML: the total-energy counter (Volta and later), polled power for boards without it.

The sensors are sums over all GPUs that NVML shows, idle ones too. The package nvidia-ml-py is the extra `nvml`; without
it, or without a driver, there is a null object with the reason.
"""

from __future__ import annotations

import importlib
from typing import Any

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.power import PowerSensor
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError


class NvmlSensor:
    """Sum of nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded).

    Args:
        nvml: the pynvml module, initialised (a fake in tests).
        handles: its device handles.
    """

    name = "nvml"
    scope: Scope = "gpu"
    method = "NVML total-energy counter"
    resolution_j = 2.0  # the counter moves every 20-100 ms: a few joules on a busy board
    wrap_j: float | None = None

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._last = 0

    @property
    def reason(self) -> str | None:
        return None

    def read(self) -> float:
        try:
            total: int = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        except Exception as error:
            raise SensorGoneError(f"NVML can no longer be read: {error}") from None
        if total < self._last:
            raise SensorGoneError(f"NVML's energy went back from {self._last} to {total} mJ: the driver was reloaded")
        self._last = total
        return total * 1e-3


def find_nvml(nvml: Any = None) -> list[Sensor]:
    """The sensors, or a null object that says what is missing."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return [_none("the package nvidia-ml-py is not installed; pip install 'trilemma[nvml]'")]
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception as error:
        return [_none(f"no NVIDIA driver ({error})")]
    if not handles:
        return [_none("NVML finds no GPU")]
    counted = [handle for handle in handles if _answers(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle) is None]
    polled = [handle for handle in handles if handle not in counted]
    found: list[Sensor] = [NvmlSensor(nvml, counted)] if counted else []
    dumb = [why for handle in polled if (why := _answers(nvml, "nvmlDeviceGetPowerUsage", handle)) is not None]
    if dumb:
        found.append(_none(f"a GPU has no total-energy counter and shows no power either ({dumb[0]})"))
    elif polled:
        found.append(_power(nvml, polled))
    return found


def _answers(nvml: Any, function: str, handle: Any) -> Exception | None:
    """What the function raises for this board; None when it answers."""
    try:
        getattr(nvml, function)(handle)
    except Exception as error:
        return error
    return None


def _power(nvml: Any, handles: list[Any]) -> PowerSensor:
    def watts() -> float:
        try:
            milliwatts: int = sum(nvml.nvmlDeviceGetPowerUsage(handle) for handle in handles)
        except Exception as error:
            raise SensorGoneError(f"NVML can no longer be read: {error}") from None
        return milliwatts * 1e-3

    return PowerSensor(
        "nvml-power", "gpu", watts, what="NVML power (no energy counter; newer boards average it over 1 s)"
    )


def _none(reason: str) -> Sensor:
    return NoSensor("nvml", "gpu", reason)
