"""One pass over a shard -> its index: where decoding can start and what it must yield."""
