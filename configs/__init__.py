"""Shipped configuration: clusters, pipelines and model profiles. Data only, no code.

It is a package so that `importlib.resources.files("configs")` finds the files in a checkout and in an
installed wheel alike.
"""
