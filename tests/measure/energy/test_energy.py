"""Joules per token from a counter in made-up time, and the estimate where there is none."""

from __future__ import annotations

import pytest

from trilemma.measure.energy.energy_model import DEVICES, device_class
from trilemma.measure.energy.per_token import Work, energy_per_token, estimate_energy, measure_energy
from trilemma.measure.energy.sensors import NoSensor, SensorGoneError


class Machine:
    """Draws `idle_w` always and `busy_w` more while it works; a GPU draws its own."""

    def __init__(self, idle_w=10.0, busy_w=20.0, gpu_w=50.0):
        self.now, self.joules, self.gpu_joules = 0.0, 0.0, 0.0
        self.idle_w, self.busy_w, self.gpu_w = idle_w, busy_w, gpu_w
        self.fails_at = float("inf")

    def pass_time(self, seconds, busy=False):
        self.now += seconds
        self.joules += seconds * (self.idle_w + (self.busy_w if busy else 0))
        self.gpu_joules += seconds * self.gpu_w

    def run(self):
        self.pass_time(0.1, busy=True)
        return Work(prompt_tokens=30, output_tokens=10)

    def sensor(self, name="counter", scope="package", resolution_j=1e-4):
        machine = self

        class Counter:
            reason, wrap_j = None, 1e6

            def read(self):
                if machine.now > machine.fails_at:
                    raise SensorGoneError("the counter went away")
                return machine.gpu_joules if scope == "gpu" else machine.joules

        found = Counter()
        found.name, found.scope, found.resolution_j = name, scope, resolution_j
        return found

    def measure(self, sensors, **more):
        return measure_energy(self.run, sensors, clock=lambda: self.now, sleep=self.pass_time, **more)


def test_gross_idle_and_net_figures():
    machine = Machine()
    found = machine.measure([machine.sensor(), NoSensor("nvml", "gpu", "no driver")])
    per_token = found["energy_j_per_output_token"]
    assert per_token.value == pytest.approx(30 * 0.1 / 10)
    assert per_token.source == "measured"
    assert per_token.window_s >= 5
    assert per_token.ci95 == pytest.approx((0.3, 0.3), abs=1e-6)
    assert per_token.conditions["idle_subtracted_j_per_output_token"] == pytest.approx(20 * 0.1 / 10)
    assert found["energy_j_per_total_token"].value == pytest.approx(30 * 0.1 / 40)
    assert found["power_w"].value == pytest.approx(30)
    assert found["idle_power_w"].value == pytest.approx(10)


def test_host_counters_add_up_and_the_gpu_is_stated_apart():
    machine = Machine()
    sensors = [machine.sensor("pkg"), machine.sensor("ram", "dram"), machine.sensor("nvml", "gpu")]
    found = machine.measure(sensors)["energy_j_per_output_token"]
    assert found.value == pytest.approx(2 * 0.3)
    assert found.sensor == "pkg+ram"
    assert found.conditions["nvml_j"] == pytest.approx(50 * found.window_s)
    both = machine.measure(sensors, scopes=("package", "gpu"))["energy_j_per_output_token"]
    assert both.value == pytest.approx(0.3 + 0.5)


def test_a_coarse_counter_gets_a_longer_window():
    machine = Machine()
    found = machine.measure([machine.sensor(resolution_j=6.0)])["power_w"]
    assert found.window_s * 30 >= 50 * 6.0


def test_every_counted_sensor_needs_its_ticks():
    """A fine counter beside a coarse one of the same sum does not make up for it."""
    machine = Machine()
    sensors = [machine.sensor("fine"), machine.sensor("coarse", "dram", 6.0)]
    assert machine.measure(sensors)["power_w"].window_s * 30 >= 50 * 6.0


def test_a_counter_that_stalls_is_an_estimate_and_not_zero_joules(fake_engine, quick_idle):
    machine = quick_idle.machine = Machine(idle_w=0.0, busy_w=0.0)
    with pytest.raises(SensorGoneError, match="did not move"):
        machine.measure([machine.sensor()])
    on = OnGpu(fake_engine, machine)
    on.engine.device = "cpu"
    found = on.measure([machine.sensor()])["energy_j_per_output_token"]
    assert found.source == "estimated"
    assert "stalls" in found.method


class OnGpu:
    """The power of a GPU that an engine keeps busy, in the time of the test's own machine."""

    def __init__(self, fake_engine, machine):
        self.engine, self.machine = fake_engine(), machine
        self.engine.device = "cuda:0"
        answer = self.engine.generate

        def generate(prompt, settings, on_token=None):
            machine.pass_time(0.1, busy=True)
            return answer(prompt, settings)

        self.engine.generate = generate

    def measure(self, sensors):
        return energy_per_token(
            self.engine, prompt_tokens=4, output_tokens=5, read_bytes_per_token=1e6, macs_per_token=1e6,
            sensors=sensors, min_window_s=0.02,
        )  # fmt: skip


@pytest.fixture
def quick_idle(monkeypatch):
    """`energy_per_token` idles in real time; here time passes only in the made-up machine."""
    import trilemma.measure.energy.per_token as per_token

    def measure(run, sensors, **more):
        machine = measure.machine
        return measure_energy(run, sensors, clock=lambda: machine.now, sleep=machine.pass_time, **more)

    monkeypatch.setattr(per_token, "measure_energy", measure)
    return measure


def test_an_engine_on_a_gpu_is_counted_with_the_gpus(fake_engine, quick_idle):
    machine = quick_idle.machine = Machine()
    sensors = [machine.sensor("pkg"), machine.sensor("nvml", "gpu")]
    energy = OnGpu(fake_engine, machine).measure(sensors)["energy_j_per_output_token"]
    assert energy.value == pytest.approx((30 + 50) * 0.1 / 5)
    assert (energy.sensor, energy.conditions["scopes"]) == ("pkg+nvml", "package+gpu")
    assert energy.conditions["device"] == "cuda:0"


def test_without_a_counter_of_the_host_the_gpus_stand_alone_and_say_so(fake_engine, quick_idle):
    machine = quick_idle.machine = Machine()
    sensors = [NoSensor("rapl", "package", "a virtual machine"), machine.sensor("nvml", "gpu")]
    energy = OnGpu(fake_engine, machine).measure(sensors)["energy_j_per_output_token"]
    assert energy.value == pytest.approx(50 * 0.1 / 5)
    assert energy.scope == "gpu"
    assert "host is not counted" in energy.method


def test_a_gpu_that_nothing_counts_is_unavailable_and_not_estimated(fake_engine):
    machine = Machine()
    found = OnGpu(fake_engine, machine).measure([machine.sensor("pkg"), NoSensor("nvml", "gpu", "no driver")])
    for one in found.values():
        assert one.source == "unavailable"
        assert "cuda:0" in one.reason
        assert "no driver" in one.reason


def test_the_processor_is_not_charged_for_an_idle_gpu(fake_engine, quick_idle):
    machine = quick_idle.machine = Machine()
    on = OnGpu(fake_engine, machine)
    on.engine.device = "cpu"
    energy = on.measure([machine.sensor("pkg"), machine.sensor("nvml", "gpu")])["energy_j_per_output_token"]
    assert energy.value == pytest.approx(30 * 0.1 / 5)
    assert energy.conditions["nvml_j"] > 0


def test_a_vanished_counter_is_an_error_or_an_estimate(fake_engine):
    machine = Machine()
    machine.fails_at = 3.0
    with pytest.raises(SensorGoneError, match="went away"):
        machine.measure([machine.sensor()])
    with pytest.raises(SensorGoneError, match="no driver"):
        machine.measure([NoSensor("nvml", "gpu", "no driver")])
    machine.now = 4.0
    found = energy_per_token(
        fake_engine(), prompt_tokens=4, output_tokens=5, read_bytes_per_token=1e6, macs_per_token=1e6, device="board",
        sensors=[machine.sensor()],
    )  # fmt: skip
    assert found["energy_j_per_output_token"].source == "estimated"
    assert "went away" in found["energy_j_per_output_token"].method


def test_the_estimate_is_the_formula_and_says_so(fake_engine):
    found = estimate_energy(
        seconds=2.0, tokens=Work(100, 50), cores=4, read_bytes=1e11, macs=1e12, precision="int8", device="board",
        reason="rapl: no powercap tree",
    )  # fmt: skip
    board = DEVICES["board"]
    joules = (
        (board.base_w + 4 * board.core_w) * 2.0 + 1e11 * board.byte_pj * 1e-12 + 1e12 * board.mac_pj["int8"] * 1e-12
    )
    per_token = found["energy_j_per_output_token"]
    assert per_token.value == pytest.approx(joules / 50)
    assert per_token.ci95 == pytest.approx((joules / 50 / board.factor, joules / 50 * board.factor))
    assert per_token.source == "estimated"
    assert "no powercap tree" in per_token.method
    assert found["energy_j_per_total_token"].value == pytest.approx(joules / 150)
    assert found["power_w"].value == pytest.approx(joules / 2)
    assert found["idle_power_w"].source == "unavailable"
    assert found["idle_power_w"].reason


def test_without_counters_the_engine_is_timed_and_estimated(fake_engine):
    engine = fake_engine(times=lambda call: [0.5 + 0.1 * k for k in range(11)])
    found = energy_per_token(
        engine, prompt_tokens=4, output_tokens=11, read_bytes_per_token=0, macs_per_token=0, device="phone",
        sensors=[NoSensor("rapl", "package", "why not")],
    )  # fmt: skip
    phone = DEVICES["phone"]
    assert found["power_w"].value == pytest.approx(phone.base_w + 2 * phone.core_w)
    assert found["energy_j_per_output_token"].conditions["seconds"] == pytest.approx(1.5)


def test_processors_have_a_class():
    assert device_class("AMD EPYC 9R14") == "server"
    assert device_class("Intel(R) Xeon(R) Platinum 8488C") == "server"
    assert device_class("BCM2712 Cortex-A76") == "board"
    assert device_class("13th Gen Intel(R) Core(TM) i7-1360P") == "laptop"
    assert device_class("AMD Ryzen 7 8840U w/ Radeon 780M Graphics") == "laptop"
    assert device_class("AMD Ryzen AI 5 340 w/ Radeon 840M") == "laptop"
    assert device_class("Intel(R) N150") == "laptop"
    assert device_class("Intel(R) Core(TM)2 Quad CPU    Q8400  @ 2.66GHz") == "desktop"
    assert device_class("AMD Ryzen 9 7950X 16-Core Processor") == "desktop"
    assert device_class("Intel(R) Core(TM) i5-6500 CPU @ 3.20GHz") == "desktop"
    assert device_class("Intel(R) Core(TM) Ultra 7 265K") == "desktop"
    assert device_class("Intel(R) Core(TM) Ultra 7 155H") == "laptop"
    assert device_class("AmpereOne") == "server"
    assert device_class("aarch64") == "board"
    assert device_class("riscv64") == "board"
    assert device_class("x86_64") == "laptop"
