"""From shards to batches: the order (pure), the store (bytes), the loader and its augmentation."""
