"""Requests -> images over HTTP. `scheduler.py` decides, `executor.py` runs, `app.py` speaks HTTP."""
