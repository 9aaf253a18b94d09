"""The utilities of ``ldm latents``: one file for each command."""
