"""Qwen3.5 and its successors of the same mathematics, dense and with experts."""
