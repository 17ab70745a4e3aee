"""What a run leaves behind: bundles, tables, pages."""
