"""One Ray per test module that asks for it, and a chat server on this machine."""

from collections.abc import Iterator

import pytest

from harness.replicas import Runtime
from tests.harness.chat_server import ChatServer


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    runtime = Runtime(num_cpus=2, num_gpus=0)
    runtime.resources()
    yield runtime
    runtime.stop()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()
