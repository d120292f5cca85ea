"""The steps of an experiment: one file a kind, with its record, its result and what it does."""
