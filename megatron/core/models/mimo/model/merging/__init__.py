"""Text and modality rows together, and levels of rows on their way into decoder layers."""
