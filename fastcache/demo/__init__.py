"""The bundled model: the scenes it was trained on, a reader that measures its images, and its weights.

Knows how scenes are drawn and described; knows nothing about U-Nets, engines or bundles.
"""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
