"""Requests -> images: over HTTP (`http/`), on one machine (`engine/`) and on many (`cluster/`)."""
