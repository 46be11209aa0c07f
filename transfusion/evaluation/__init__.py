"""Metrics of generated text and images."""
