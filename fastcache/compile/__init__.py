"""A model -> a bundle of engines."""
