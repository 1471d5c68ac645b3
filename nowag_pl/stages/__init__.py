"""Stages that process the blocks of a model one after the other."""
