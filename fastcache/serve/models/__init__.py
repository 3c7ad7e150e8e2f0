"""The models that one server offers: where their bundles lie, which of them are loaded, and how they may be drawn."""
