"""Where arrays live. Every device offers the same few functions: see engine/device/numpy.py."""

from importlib import import_module
from types import ModuleType


def load(device: str) -> ModuleType:
    """The functions of `device` ("numpy"): zeros, to_device, to_host, available_bytes."""
    return import_module(f"engine.device.{device}")
