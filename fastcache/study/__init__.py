"""What caching costs and gains, measured."""
