"""Sources of raw documents, and how they become prepared, packed rows."""

from absl import logging

logging.set_verbosity(logging.ERROR)  # grain warns that JAX is missing; nothing here needs it
