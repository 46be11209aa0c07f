"""Speed: `python -m benchmarks` measures it, as ratios of things that are measured side by side in one call."""
