"""`python -m mergetune`, for torchrun."""

from mergetune.cli import app

app()
