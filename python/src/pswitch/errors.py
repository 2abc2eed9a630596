"""The one error of this package that a command line prints without a traceback."""


class ExportError(Exception):
    """What was asked for cannot be exported; the message says why and what would help."""
