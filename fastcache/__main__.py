"""`python -m fastcache`: the command line."""

from fastcache.cli import main

main()
