"""`python -m dsv4_hal` is the command `dsv4-hal`."""

from dsv4_hal.cli import main

main()
