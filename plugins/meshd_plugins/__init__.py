"""Plugins of meshd: the types they are written against, the manager, and the built-in ones.

An author needs `meshd_plugins.api`, `meshd_plugins.hookspecs.hookimpl` and, for tests,
`meshd_plugins.testing`. docs/plugins.md is the way in.
"""
