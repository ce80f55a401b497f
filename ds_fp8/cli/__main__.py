"""`python -m ds_fp8.cli`: the command `ds_fp8`, where its script is not on the path."""

from ds_fp8.cli import main

main()
