"""Runs a model in this project and in other runtimes, side by side and fairly; see docs/benchmark.md."""
