"""What a job left and what it shows: rows, evidence, verdicts, export."""
