"""Whole models: replayed, compared, and where two of them part."""
