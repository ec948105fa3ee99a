"""What a run takes before it starts, for ``python -m megatron.mimo.plan``."""
