"""One case: run on a backend, watched, and judged."""
