"""One pass over a shard -> its index: where decoding can start, and what has to come out."""
