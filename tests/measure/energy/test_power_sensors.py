"""Meters that show power, and batteries: boards, metered supplies, laptops, on made-up sysfs trees."""

from __future__ import annotations

import gc
import time

import pytest

from trilemma.measure.energy.sensors import SensorGoneError
from trilemma.measure.energy.sensors.battery import find_battery
from trilemma.measure.energy.sensors.hwmon import find_hwmon
from trilemma.measure.energy.sensors.ina import find_ina
from trilemma.measure.energy.sensors.power import PowerSensor


def hwmon(tree):
    return find_hwmon(tree.hwmon_root, clock=tree.clock, poll=False)


def ina(tree):
    return find_ina(tree.hwmon_root, tree.iio, clock=tree.clock, poll=False)


def battery(tree):
    return find_battery(tree.supply, clock=tree.clock, poll=False)


def test_power_is_integrated_by_trapezoids(tree):
    levels = {1000.0: 10.0, 1001.0: 10.0, 1002.0: 20.0, 1005.0: 20.0, 1006.0: 0.0}
    sensor = PowerSensor("meter", "wall", lambda: levels[tree.now], what="a meter", clock=tree.clock, poll=False)
    joules = []
    for tree.now in levels:
        joules.append(sensor.read())
    assert joules == pytest.approx([0, 10, 25, 85, 95])
    assert sensor.variance_j2 == pytest.approx((5**2 + 10**2) / 3)  # uniform in +- half of each step's change
    assert sensor.resolution_j == pytest.approx(95 / 4)  # so that 50 ticks are 50 readings
    assert "trapezoids" in sensor.method


def test_power_of_a_real_thread_follows_the_meter():
    """Not a timing: the integral of a constant is its value times the time that passed, however late the thread is."""
    sensor = PowerSensor("meter", "wall", lambda: 5.0, what="a meter", period_s=0.005)
    began = time.monotonic()
    before = sensor.read()
    while sensor._readings < 5:
        time.sleep(0.005)
    spent = sensor.read() - before
    assert 0 < spent <= 5.0 * (time.monotonic() - began) * 1.001
    assert sensor.variance_j2 == 0


def test_the_thread_ends_with_its_sensor():
    sensor = PowerSensor("meter", "wall", lambda: 5.0, what="a meter", period_s=0.005)
    sensor.read()
    thread = sensor._poller._thread
    assert thread.is_alive()
    del sensor
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("watts", [-3.0, float("nan")])
def test_what_is_no_power_is_refused(watts):
    sensor = PowerSensor("meter", "wall", lambda: watts, what="a meter", poll=False)
    with pytest.raises(SensorGoneError, match="no power"):
        sensor.read()


def test_amd_energy_counts_sockets_and_not_their_cores(tree):
    device = tree.hwmon(
        2, "amd_energy", energy1_label="Ecore000", energy1_input=5, energy2_label="Esocket0", energy2_input=1_000_000,
        energy3_label="Esocket1", energy3_input=2_000_000,
    )  # fmt: skip
    (sensor,) = hwmon(tree)
    assert (sensor.name, sensor.scope, sensor.read()) == ("hwmon-amd_energy", "package", 3.0)
    tree.write(device, energy1_input=900_000, energy2_input=2_500_000)
    assert sensor.read() == pytest.approx(4.5)
    tree.write(device, energy2_input=1)
    with pytest.raises(SensorGoneError, match="went back"):
        sensor.read()


def test_a_metered_supply_is_the_wall(tree):
    device = tree.hwmon(0, "power_meter", power1_average=80_000_000, power1_average_interval=1000)
    (sensor,) = hwmon(tree)
    assert sensor.scope == "wall"
    assert "every 1 s" in sensor.method  # polling faster than it averages would add nothing
    sensor.read()
    tree.now += 2
    tree.write(device, power1_average=100_000_000)
    assert sensor.read() == pytest.approx(180.0)


def test_an_apu_is_a_package_and_a_card_a_gpu(tree):
    tree.hwmon(0, "amdgpu", power1_average=9_000_000, power1_label="PPT", in1_label="vddnb")
    tree.hwmon(1, "amdgpu", power1_average=70_000_000, power1_input=71_000_000, power1_label="PPT", in0_label="vddgfx")
    found = {sensor.name: sensor.scope for sensor in hwmon(tree)}
    assert found == {"hwmon-amdgpu-package": "package", "hwmon-amdgpu": "gpu"}


def test_meters_of_unknown_things_are_named_and_not_counted(tree):
    tree.hwmon(0, "k10temp", temp1_input=40000)
    tree.hwmon(1, "mystery", power1_input=5_000_000)
    tree.hwmon(2, "BAT0", power1_input=5_000_000)
    (sensor,) = hwmon(tree)
    assert sensor.name == "hwmon-mystery"
    assert "not known what they cover" in sensor.reason


def test_a_raspberry_pi_and_a_virtual_machine_have_nothing(tree):
    assert "no hwmon tree" in hwmon(tree)[0].reason
    tree.hwmon(0, "cpu_thermal", temp1_input=50000)
    tree.hwmon(1, "rpi_volt", in0_lcrit_alarm=0)
    for found in (hwmon(tree), ina(tree), battery(tree)):
        assert [bool(sensor.reason) for sensor in found] == [True]


def test_a_jetson_counts_its_input_rail_alone(tree):
    device = tree.jetson_orin_nano(milliamperes=1200)
    (sensor,) = ina(tree)
    assert (sensor.name, sensor.scope) == ("ina-VDD_IN", "wall")
    sensor.read()
    tree.now += 10
    tree.write(device, curr1_input=1400)
    assert sensor.read() == pytest.approx(10 * (6.0 + 7.0) / 2)
    assert "no device" in hwmon(tree)[0].reason  # and nobody else counts it again


def test_an_agx_orin_adds_the_rails_that_lie_side_by_side(tree):
    tree.jetson_agx_orin()
    (sensor,) = ina(tree)
    assert sensor.scope == "soc"
    sensor.read()
    tree.now += 1
    assert sensor.read() == pytest.approx(3.0 + 2.0 + 4.5)  # without VDDQ, which VIN_SYS_5V0 feeds


def test_a_jetson_nano_of_old_is_read_through_iio(tree):
    tree.write(
        tree.iio / "iio:device0", name="ina3221x", rail_name_0="POM_5V_IN", in_power0_input=4000,
        rail_name_1="POM_5V_GPU", in_power1_input=500, rail_name_2="POM_5V_CPU", in_power2_input=900,
    )  # fmt: skip
    (sensor,) = ina(tree)
    assert (sensor.name, sensor.scope) == ("ina-POM_5V_IN", "wall")
    sensor.read()
    tree.now += 3
    assert sensor.read() == pytest.approx(12.0)


def test_rails_that_are_parts_or_unlabelled_are_not_the_whole(tree):
    device = tree.hwmon(0, "ina3221", in1_label="VDD_CPU", in1_input=5000, curr1_input=10)
    assert "VDD_CPU" in ina(tree)[0].reason
    (device / "in1_label").unlink()
    tree.hwmon(0, "ina219", in1_input=5000, curr1_input=10, power1_input=50_000)
    assert "without a label" in ina(tree)[0].reason


def test_a_rail_that_vanishes_is_noticed(tree):
    device = tree.jetson_orin_nano()
    (sensor,) = ina(tree)
    sensor.read()
    (device / "curr1_input").unlink()
    with pytest.raises(SensorGoneError, match="ina-VDD_IN can no longer be read"):
        sensor.read()


def test_a_discharging_battery_is_the_wall(tree):
    pack = tree.battery(energy_now=40_000_000, energy_full=50_120_000, energy_full_design=57_020_000)
    tree.mains(0)
    (sensor,) = battery(tree)
    assert (sensor.scope, sensor.read()) == ("wall", 0.0)
    assert sensor.resolution_j == pytest.approx(36.0)  # steps of 10 mWh
    tree.write(pack, energy_now=39_900_000)
    assert sensor.read() == pytest.approx(360.0)
    assert sensor.resolution_j == pytest.approx(360.0)  # the firmware writes as rarely as that
    tree.now += 60
    tree.write(pack, energy_now=39_700_000)  # nobody looked for a minute: that is no step
    assert (sensor.read(), sensor.resolution_j) == (pytest.approx(1080.0), pytest.approx(360.0))
    tree.write(pack, energy_now=39_750_000)  # a gauge that corrects itself gives nothing back
    assert sensor.read() == pytest.approx(1080.0)


def test_batteries_add_up_and_charge_is_taken_at_its_voltage(tree):
    one = tree.battery("BAT0", energy_now=10_000_000)
    two = tree.battery("BAT1", status="Unknown", charge_now=3_000_000, voltage_now=11_500_000)
    (sensor,) = battery(tree)
    sensor.read()
    tree.write(one, energy_now=9_990_000)
    tree.write(two, charge_now=2_990_000)
    assert sensor.read() == pytest.approx(36.0 + 0.01 * 3600 * 11.5)


def test_plugged_in_says_nothing_of_the_machine(tree):
    pack = tree.battery(status="Charging", energy_now=10_000_000)
    tree.mains(1)
    assert "plugged in (AC is online" in battery(tree)[0].reason
    tree.mains(0)
    assert "not discharging" in battery(tree)[0].reason
    tree.write(pack, status="Discharging")
    (sensor,) = battery(tree)
    sensor.read()
    tree.mains(1)
    with pytest.raises(SensorGoneError, match="plugged in"):
        sensor.read()


def test_a_mouse_is_no_battery_of_the_machine(tree):
    tree.write(tree.supply / "hidpp_battery_0", type="Battery", scope="Device", status="Discharging", online=1)
    assert "no battery" in battery(tree)[0].reason
    tree.battery(energy_now=10_000_000)
    assert battery(tree)[0].reason is None


def test_a_gauge_without_numbers_is_a_reason(tree):
    tree.battery(capacity=80)
    assert "neither energy_now nor charge_now" in battery(tree)[0].reason
