"""One folder per backend, the same file names in each; found through the entry-point group `dsv4_hal.backends`."""
