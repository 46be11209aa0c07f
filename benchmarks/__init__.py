"""Speed: `python -m benchmarks` reports ratios between alternatives that are timed alternately in one call."""
