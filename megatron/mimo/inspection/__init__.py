"""What training would see of data: samples, labels, media and refusals, on a terminal or a page."""
