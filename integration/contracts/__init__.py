"""Contracts with engine releases: what the plugin uses of an engine must be there, release by release.

Nothing here imports an engine.  A release is read from its wheel, so one run covers every supported release.
"""
