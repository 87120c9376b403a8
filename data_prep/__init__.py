"""Images → checked, shuffled webdataset shards with a manifest, an index and sample offsets. Imports no torch."""
