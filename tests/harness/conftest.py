"""One Ray per test module that asks for it."""

from collections.abc import Iterator

import pytest

from harness.replicas import Runtime


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    runtime = Runtime(num_cpus=2, num_gpus=0)
    runtime.resources()
    yield runtime
    runtime.stop()
