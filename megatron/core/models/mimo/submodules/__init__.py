"""One modality: encoders -> combine -> project."""
