"""What it reads: sources of raw documents, and the way from them to prepared, packed rows."""

from absl import logging

logging.set_verbosity(logging.ERROR)  # grain warns that JAX is missing; nothing here needs it
