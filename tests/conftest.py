"""Eight emulated CPU devices for every test, asserted; a compilation cache shared by the workers."""

import gc
import os
import pathlib
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # two threads a device, as in moe_jax.mesh.emulate_devices

# a shell has what runs in its background ignore it, and so would the processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # the environment above must be set first
import pytest

from moe_jax import xla_flags
from moe_jax.routing import ROUTERS

# compile time is most of the suite's time, and no test measures speed: XLA's cheapest level halves it, its older emitters of fusions
# (while it has them: a flag that XLA does not know ends the process) take a third off the rest
CHEAP = ("xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true", "xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(f"--{flag}" for flag in CHEAP if xla_flags.known(flag.partition("=")[0]))
gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million, few of them garbage

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_sessionstart(session):
    assert jax.device_count() == 8, f"the tests need 8 emulated CPU devices and see {jax.device_count()}"


def pytest_runtest_teardown(item):
    assert jax.device_count() == 8, f"{item.nodeid} leaves {jax.device_count()} devices to the tests after it"


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded as `figures`: docs/reliability.md has them."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(f"\n{report.nodeid}\n{text}")


@pytest.fixture
def faults(monkeypatch):
    """Lets a test import what lies in tests/faults, and leaves no router of it to the tests after it."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "faults")
    known = set(ROUTERS)
    yield
    for name in set(ROUTERS) - known:
        sys.modules.pop(ROUTERS.pop(name).__module__)
