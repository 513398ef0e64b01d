"""Discrete-event simulation of LLM inference clusters on SimPy."""
