"""Measurements of speed, as ratios within one run; jobs/benchmark.py calls them."""
