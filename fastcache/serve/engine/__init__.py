"""Requests in flight on one machine: who runs next, and the engine calls that they share."""
