"""`python -m pyfacts`."""

from .cli import main

main()
