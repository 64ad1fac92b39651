"""Files on disk, and nothing else: atomic writes, hashes, the cache, checkpoints, exports, snapshots of averages."""
