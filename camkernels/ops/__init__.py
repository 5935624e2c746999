"""Public functions: argument checks, autograd, docstrings. No kernel lives here."""
