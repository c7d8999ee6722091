"""Masks and outputs as sums: arrays read by rows, packed bits, second moments that are kept and extended."""

from dmdata.late_names import late_names

__getattr__ = late_names(__name__, {"Moments": "dmpipeline.moments.moments"})  # this folder was that file
