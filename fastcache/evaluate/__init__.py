"""How good: pictures of several plans beside those without caching."""
