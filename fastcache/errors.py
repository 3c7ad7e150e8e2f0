"""What can go wrong in a way that a caller acts on; every other bad argument is a `ValueError`."""

from fastcache_engines import BackendUnavailable

__all__ = ["BackendUnavailable", "BuildError", "BundleError", "PartitionError"]


class PartitionError(ValueError):
    """The U-Net cannot be cut, or not at this branch id."""


class BundleError(RuntimeError):
    """A folder is not a bundle, or not the one that was built for this machine and these versions."""


class BuildError(RuntimeError):
    """Engines could not be built; nothing was left behind."""
