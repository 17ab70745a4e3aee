"""What the reference itself is compared with."""
