"""InternVL: images of any resolution and clips, as tiles of one size."""
