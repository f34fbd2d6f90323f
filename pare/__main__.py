"""`python -m pare` is the `pare` command."""

from pare.cli import main

main()
