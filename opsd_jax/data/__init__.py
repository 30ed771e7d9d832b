"""Data: the released layout, prepared files, packed batches."""
