"""Conversations and documents to samples of one model, through its Hugging Face processor."""
