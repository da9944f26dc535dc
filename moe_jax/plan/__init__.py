"""Answers before hardware: what a config needs of a topology (memory, traffic, time), from shapes alone or from the chip's own compiler."""
