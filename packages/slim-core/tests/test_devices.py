import pytest

from slim_core.devices import Device
from slim_core.errors import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize(
    ("name", "device", "text"),
    [
        ("cpu", Device("cpu"), "cpu"),
        ("npu", Device("npu"), "npu"),
        ("npu:0", Device("npu", 0), "npu:0"),
        ("cuda:1", Device("cuda", 1), "cuda:1"),
        ("gpu", Device("cuda"), "cuda"),
        ("gpu:12", Device("cuda", 12), "cuda:12"),
    ],
)
def test_names(name, device, text):
    assert Device.parse(name) == device
    assert str(device) == text
    assert Device.parse(text) == device


@pytest.mark.parametrize(
    "name", ["", "tpu", "npu:", "npu:-1", "npu:01", "npu:x", "cpu:0", "npu:0:1", " npu", "npu:٣"]
)
def test_other_names_are_refused(name):
    with pytest.raises(InvalidValueError, match="device must be cpu, cuda, npu or gpu"):
        Device.parse(name)


def test_hint():
    with pytest.raises(InvalidValueError, match="did you mean 'cuda'"):
        Device.parse("Cuda:0")


def test_bad_parts():
    with pytest.raises(InvalidTypeError, match="device must be str, not int"):
        Device.parse(0)
    with pytest.raises(InvalidValueError, match="kind must be one of"):
        Device("gpu")
    with pytest.raises(InvalidValueError, match="index must be at least 0, not -1"):
        Device("npu", -1)
    with pytest.raises(InvalidValueError, match="None for a cpu"):
        Device("cpu", 0)
