"""Work and rows that move between ranks."""
