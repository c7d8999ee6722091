"""Figures in one style, as files of their own."""
