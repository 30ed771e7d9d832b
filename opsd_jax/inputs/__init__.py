"""Checks of everything that users and other programs give: values, paths, flags, JSON files."""
