"""Carrying an experiment out: jobs, cells, reuse, the journal, and the executor's protocol."""
