"""The data of the recipes that need no download."""
