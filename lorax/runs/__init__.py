"""Trials on disk: ids, directories, locks, checkpoints, results, trackers."""
