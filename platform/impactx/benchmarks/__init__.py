"""Measurements of speed, as ratios within one run; called by jobs/benchmark.py."""
