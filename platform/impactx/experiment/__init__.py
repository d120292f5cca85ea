"""Pure bookkeeping of an experiment: its plan, fingerprints, reuse and selection."""
