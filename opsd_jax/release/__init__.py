"""Released checkpoint folders, in and out."""
