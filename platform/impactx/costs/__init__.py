"""What an experiment costs: its flow counted and priced, and carried out by nobody."""
