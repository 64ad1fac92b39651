"""Files on disk: atomic writes, hashes, the cache, checkpoints, exports, snapshots of averages."""
