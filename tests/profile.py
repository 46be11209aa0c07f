"""Test profiles: `make test` has few examples and short runs, `make test-all` has many examples and long runs."""

import os
from unittest import mock

from hypothesis import settings

THOROUGH = os.environ.get("TEST_PROFILE") == "all"
# Also for tests without `examples`: on a busy machine any example may take longer than Hypothesis's 200 ms.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


def few_samples(count: int = 64):
    """A context in which loaders estimate document lengths from this many documents, because tests create many loaders."""
    return mock.patch("transfusion.data.loader.NUM_PROBED_DOCUMENTS", count)


def examples(thorough: int, quick: int = 25) -> settings:
    """Hypothesis settings: number of examples in `make test-all`, and the maximum in `make test`."""
    return settings(max_examples=thorough if THOROUGH else min(thorough, quick))
