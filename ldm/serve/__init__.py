"""A page to play in: a web server that draws with one pipeline, one image at a time, on the machine it runs on."""
