"""Evaluation: batched inference with resume, results, public tables, scoring, statistics, pages."""
