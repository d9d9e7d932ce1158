"""One file, one command, one question: the first line of its docstring."""
