"""The store of maps: shards of Parquet, how they are read and scaled, and sheets of examples."""
