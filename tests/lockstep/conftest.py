"""What the tests of a foreign L1's stops share."""

from __future__ import annotations

import pytest

from tests.lockstep.observed import World


@pytest.fixture
def world() -> World:
    return World()
