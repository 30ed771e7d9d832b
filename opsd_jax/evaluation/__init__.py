"""Evaluation: batched inference with resume, results, public tables, scoring rules, statistics, pages."""
