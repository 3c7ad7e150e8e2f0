"""How fast: loops of several kinds side by side in one run."""
