"""What is known beforehand: closed forms and golden vectors."""
