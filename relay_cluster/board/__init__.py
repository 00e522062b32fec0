"""The live page (`relay dashboard`) and the terminal view (`relay top`) of a running service."""
