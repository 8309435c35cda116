"""Runs tests in an interpreter of their own, as a script: what it spawns imports it again, as with a user's script."""

import sys

import pytest

import glai_lightning  # noqa: F401  (first, in spawned processes too)

if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:xdist", "-p", "no:cacheprovider", *sys.argv[1:]]))
