"""The pytest plugin: clients on the memory backend, clean for each test. Imports nothing heavy until used."""

from __future__ import annotations
