"""What comes from outside is checked here: values, paths, flags, JSON files."""
