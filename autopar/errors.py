"""The errors autopar raises, all `AutoparError`. Each class's docstring says when and what to do."""

from costmodel.errors import *  # noqa: F403
