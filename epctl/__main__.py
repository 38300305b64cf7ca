"""`python -m epctl` is the `epctl` command."""

from epctl.cli import main

main()
