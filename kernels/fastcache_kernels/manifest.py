"""What the ahead-of-time kernels and those who look for them agree on: names, and the hash of the sources.

Needs neither torch nor Triton, so that the library can be built without torch.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

KERNELS = {
    "channel_statistics": "triton_norm",
    "normalise": "triton_norm",
    "guidance_statistics": "triton_guidance",
    "guidance_step": "triton_guidance",
}
MANIFEST = "aot.json"
LIBRARY = "libfastcache_kernels.so"
ALIGNMENT = 16  # of addresses in bytes, and of sizes in elements: what a load of 16 bytes a thread rests on


@cache
def source_hash() -> str:
    """What the kernels' sources are, in one hash: ahead-of-time kernels of other sources are not used."""
    digest = hashlib.sha256()
    for name in sorted(set(KERNELS.values())):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
