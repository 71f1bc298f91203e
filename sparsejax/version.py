"""Holds the version, which setup.cfg, the command line and the documentation read here."""

__version__ = '0.1.0'
