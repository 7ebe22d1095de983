"""Benchmarks of this repository, started by tools/analysis_tools/benchmark.py; not installed."""
