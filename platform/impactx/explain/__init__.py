"""Attribution maps: masking, the batched partition engine, other attributions, the shard store."""
