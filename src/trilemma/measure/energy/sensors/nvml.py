"""NVIDIA GPUs through NVML's total-energy counter (Volta and later), one sensor over all visible GPUs.

The package nvidia-ml-py is the extra `nvml`; without it, or without a driver, there is a null
object with the reason.
"""

from __future__ import annotations

import importlib
from typing import Any

from trilemma.core.measurement import Scope
from trilemma.measure.energy.sensors.sensor import NoSensor, Sensor, SensorGoneError


class NvmlSensor:
    """Sum of nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded).

    Args:
        nvml: the pynvml module, initialised (a fake in tests).
        handles: its device handles.
    """

    name = "nvml"
    scope: Scope = "gpu"
    resolution_j = 2.0  # the counter moves every 20-100 ms: a few joules on a busy board
    wrap_j: float | None = None

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    @property
    def reason(self) -> str | None:
        return None

    def read(self) -> float:
        try:
            total: int = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        except Exception as error:
            raise SensorGoneError(f"NVML can no longer be read: {error}") from None
        return total * 1e-3


def find_nvml(nvml: Any = None) -> list[Sensor]:
    """The sensor, or a null object that says what is missing."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return [_none("the package nvidia-ml-py is not installed; pip install 'trilemma[nvml]'")]
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        if not handles:
            return [_none("NVML finds no GPU")]
        sensor = NvmlSensor(nvml, handles)
        sensor.read()
    except SensorGoneError as error:
        return [_none(f"this GPU has no total-energy counter ({error})")]
    except Exception as error:
        return [_none(f"no NVIDIA driver ({error})")]
    return [sensor]


def _none(reason: str) -> Sensor:
    return NoSensor("nvml", "gpu", reason)
