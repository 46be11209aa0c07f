"""How thoroughly the tests look: `make test` with few examples and short runs, `make test-all` with many and long ones."""

import os
from unittest import mock

from hypothesis import settings

THOROUGH = os.environ.get("TEST_PROFILE") == "all"


def few_samples(count: int = 64):
    """While it is open a loader looks at so many documents of a source to learn how long they are: it is made so often."""
    return mock.patch("transfusion.data.loader.NUM_SAMPLES", count)


def examples(thorough: int, quick: int = 25) -> settings:
    """Settings of a property: how many examples are tried by `make test-all`, and at most how many by `make test`."""
    return settings(max_examples=thorough if THOROUGH else min(thorough, quick), deadline=None)
