"""Fixtures for the tests of models/."""

import jax.monitoring
import pytest


@pytest.fixture
def compilations():
    """The programs that XLA has compiled since the test began, as a list that grows; clear() it after warming up."""
    compiled = []

    def listener(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listener)
