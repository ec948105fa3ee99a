"""What a micro-batch brings: its values, their checks, its plan and its labels."""
