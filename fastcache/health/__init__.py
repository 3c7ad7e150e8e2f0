"""What this machine can do, and whether a bundle is what was built."""
