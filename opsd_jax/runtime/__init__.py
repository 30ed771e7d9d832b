"""What long-running commands need: checkpoints, files, locks, stopping, metrics, processes."""
