"""Processes, and what passes between them and files."""
