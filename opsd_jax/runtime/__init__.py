"""What every long-running command needs: checkpoints, files, locks, stopping, metrics, progress, processes."""
