"""Carrying an experiment out: what a job tells its tracker while it works."""
